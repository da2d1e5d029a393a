"""Wikipedia's markup to plain prose: what a reader would read aloud, without tables, lists, notes and references."""

from __future__ import annotations

import html
import re

MIN_LINE = 60  # characters: shorter lines are captions, stray labels and what a template left behind

# Blocks that are not prose go with their content; of other tags only the tag goes.
BLOCKS = "math|gallery|timeline|source|syntaxhighlight|imagemap|score|pre|poem|chem|hiero"
DROPPED = (
    re.compile(r"<!--.*?-->", re.S),
    re.compile(r"<ref\b[^<>]*/>", re.I),
    re.compile(r"<ref\b[^>]*>.*?</ref\s*>", re.I | re.S),
    re.compile(rf"<({BLOCKS})\b[^<>]*>.*?</\1\s*>", re.I | re.S),
    re.compile(r"__[A-Z]+__"),
)
# The innermost link, template and table; they nest in each other, so all three are resolved until nothing changes.
LINK = re.compile(r"\[\[((?:(?!\[\[|\]\]|\{\{|\}\}).)*)\]\]", re.S)
TEMPLATE = re.compile(r"\{\{((?:(?!\{\{|\}\}|\{\||\[\[|\]\]).)*)\}\}", re.S)
TABLE = re.compile(r"\{\|(?:(?!\{\||\{\{|\[\[).)*?\n\s*\|\}", re.S)
NAMESPACE = re.compile(r"\s*:?\s*(file|image|category|media|template|wikipedia|wp|[a-z]{2,3}(-[a-z]+)?)\s*:", re.I)
URL_WITH_LABEL = re.compile(r"\[(?:https?:|ftp:|//)\S*\s+([^\[\]]*)\]")
URL = re.compile(r"\[?(?:https?://|ftp://)[^\s\]]*\]?")
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$")
BACK_MATTER = {
    *("see also", "notes", "references", "further reading", "external links", "bibliography", "footnotes", "sources"),
    *("works cited", "citations", "notes and references", "references and notes", "gallery", "discography"),
    *("filmography", "publications", "selected bibliography", "works", "select bibliography", "literature"),
}
# Templates that wrap words of the sentence: name -> which positional argument is read.
SPOKEN = dict.fromkeys(("nowrap", "small", "smaller", "big", "quote", "blockquote", "sic", "nihongo", "abbr"), 0)
SPOKEN |= dict.fromkeys(("lang", "transl"), -1)


def prose(wikitext: str) -> str:
    """Paragraphs of running text, separated by blank lines; empty if there are none."""
    text = wikitext
    for pattern in DROPPED:
        text = pattern.sub("", text)
    before = None
    while before != text:
        before = text
        text = TABLE.sub("", TEMPLATE.sub(_template, LINK.sub(_link, text)))
    text = URL.sub("", URL_WITH_LABEL.sub(r"\1", text))
    text = re.sub(r"'''(?=s\b)", "'", text)  # ''Iliad'''s is an italic title and a possessive
    text = re.sub(r"'{2,}", "", re.sub(r"<br\s*/?>", " ", text, flags=re.I))
    text = html.unescape(TAG.sub("", text))
    return "\n\n".join(_paragraphs(text))


def _link(match: re.Match) -> str:
    """[[target|label]] -> label; files, categories and links to other languages vanish."""
    target, *parts = match[1].split("|")
    if NAMESPACE.match(target):
        return ""
    return parts[-1] if parts and parts[-1] else target.rpartition("#")[0] or target


def _template(match: re.Match) -> str:
    """The words of templates that wrap words; every other template vanishes."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name = name.lower()
    if name == "convert" and len(arguments) > 1:
        return f"{arguments[0]} {arguments[1]}"
    if name.startswith("lang-") or name in SPOKEN:
        words = [part for part in arguments if not re.match(r"\w+\s*=", part)]
        return words[SPOKEN.get(name, 0)] if words else ""
    return {"ndash": "–", "mdash": "—", "spaced ndash": " – ", "'": "'", "=": "="}.get(name, "")


def _paragraphs(text: str) -> list[str]:
    kept, skipped_level = [], 0
    for line in text.splitlines():
        line = line.strip()
        if heading := HEADING.match(line):
            level = len(heading[1])
            if not skipped_level or level <= skipped_level:
                skipped_level = level if heading[2].lower() in BACK_MATTER else 0
            continue
        if skipped_level or line.startswith(("*", "#", ":", ";", "|", "!", "{", "}")):
            continue
        line = re.sub(r"\(\s*[,;:]?\s*", "(", re.sub(r"\s+", " ", line))
        line = re.sub(r"\s*\(\s*\)", "", re.sub(r"[\s,;:]+\)", ")", line))
        line = re.sub(r"\s+([,.;:])", r"\1", line)
        if len(line) > MIN_LINE:
            kept.append(line)
    return kept
