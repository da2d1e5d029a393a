"""Every flag of every recipe has a range: senseless values are refused, or accepted because the field says so."""

import re
from dataclasses import fields
from typing import get_args, get_origin, get_type_hints

import pytest
import yaml

from recipes.common.core.cli import main, parse, recipe_class, recipe_names
from recipes.common.core.flags import default, kind, read_yaml
from zoo.errors import UserError

HUGE = 10**30
SENSELESS = {
    bool: ["yes", "", 1, None],
    int: [-5, 0, HUGE, -HUGE, 1.5, True, "many", "", float("nan"), None],
    float: [-5.0, 0.0, 1e30, float("nan"), float("inf"), -float("inf"), True, "much", HUGE, None],
    str: ["", " \0", "a\nb", "\ud800", "x" * 300, "a/" + "x" * 300, "x/" * 3000, 5, True, 2.5, None],
}
NO_REGEX = ["(", "[", "*", "a{99999999999999999999}", "(?P<x>a)(?P<x>b)", "\\", "("]
FINE = {("include", "x" * 300), ("exclude", "x" * 300), ("include", "x/" * 3000), ("exclude", "x/" * 3000)}
FINE |= {("include", "a/" + "x" * 300), ("exclude", "a/" + "x" * 300)}  # a long regex is a regex


def accepted(field, hint, value) -> bool:
    """Whether the field says that an empty list, no text or 0 means something, or this file that a value is fine."""
    if get_origin(hint) is list and value == []:
        return default(field) == [] or "empty" in field.metadata
    if get_origin(hint) is list and isinstance(value, list):
        value, hint = value[0], kind(hint)
    if isinstance(value, list | dict) or get_origin(hint) is list:
        return False
    if value is None:
        return type(None) in get_args(hint)
    if value == "" and kind(hint) is str:
        return "regex" in field.metadata
    if value == 0 and isinstance(value, int | float) and not isinstance(value, bool):
        return field.metadata.get("at_least") == 0
    return isinstance(value, str) and (field.name, value) in FINE


def cases(field, hint):
    values = [*SENSELESS[kind(hint)], *(NO_REGEX if "regex" in field.metadata else [])]
    if get_origin(hint) is list:
        return ["abc", 5, {}, [], [[]], *([value] for value in values)]
    return [*values, [], {}, ["a"]]


@pytest.mark.parametrize("name", recipe_names())
def test_senseless_values_of_every_flag_are_refused(name):
    cls = recipe_class(name)
    hints, wrong = get_type_hints(cls), []
    for field in fields(cls):
        for value in cases(field, hints[field.name]):
            try:
                cls(**{field.name: value}).check()
                refused = ""
            except UserError as error:
                refused = str(error)
                assert "\n" not in refused and len(refused) < 400 and refused.endswith("."), refused
            if bool(refused) is accepted(field, hints[field.name], value):
                wrong.append((field.name, str(value)[:40], refused))
    assert not wrong


@pytest.mark.parametrize("name", recipe_names())
def test_every_number_has_a_range_and_its_default_is_in_it(name):
    cls = recipe_class(name)
    hints = get_type_hints(cls)
    cls().check()
    for field in fields(cls):
        hint = hints[field.name]
        if kind(hint) in (int, float) and "choices" not in field.metadata:
            assert {"at_least", "above"} & field.metadata.keys(), field.name
            assert {"at_most", "below"} & field.metadata.keys(), field.name


def test_help_tells_ranges_and_what_turns_a_flag_off(capsys):
    with pytest.raises(SystemExit):
        main(["precropping", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images; from 0 to 10,000 (default: 4)" in said
    assert "peak learning rate; above 0 and at most 100 (default: 0.1)" in said
    assert "turn --augment off" in said and "turn --augment off (default" not in said
    assert said.count("shift or crop, and mirror, the training images") == 1


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nsamples", "many"], "--nsamples many: a whole number is needed."),
        (["--nsamples", "8.5"], "--nsamples 8.5: a whole number is needed."),
        (["--nsamples"], "argument --nsamples: expected one argument; see --help."),
        (["--banana", "1"], "unrecognized arguments: --banana 1; see --help."),
        (["--lr", "inf"], "--lr inf: a number above 0 and at most 10 is needed."),
        (["--lr", "1e30"], "--lr 1e+30: a number above 0 and at most 10 is needed."),
        (["--refit", "x"], "--refit x: one of M+A+S+B, A+S+B, A+S, A, none is needed."),
        (["--seeds", "0"], "--seeds 0: a whole number from 1 to 100 is needed."),
        (["--seed", str(2**64)], "--seed 18446744073709551616: a whole number from 0 to 4,611,686,018,427,387,904"),
        (["--eval_seqlen", str(10**8)], "--eval_seqlen 100000000: a whole number from 2 to 16,777,216 is needed."),
        (["--eval_windows", "0"], "--eval_windows 0: a whole number from 1 to"),
        (["--task_limit", "0"], "--task_limit 0: a whole number from 1 to"),
        (["--workers", "-3"], "--workers -3: a whole number from 0 to 1,024 is needed."),
        (["--include", "("], r"--include (: no regular expression (missing ), unterminated"),
        (["--output", "x" * 300], "x...: it is 300 bytes long, a name takes 255 at most."),
        (["--output", "x" * 130], "x...: a name of 120 bytes at most is needed."),
        (["--output", "a\0b"], r"--output 'a\x00b': it holds a character that is none of a text."),
        (["--config", "a\0b"], "not a YAML file"),
        (["--config", "no.yaml"], "--config no.yaml: cannot be read (No such file or directory)."),
    ],
)
def test_a_slip_on_the_command_line_is_one_sentence(flags, says):
    with pytest.raises(UserError) as caught:
        parse("armor", flags)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_other_commands_say_one_sentence_too(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["nonsense"],
        ["verify"],
        ["verify", str(tmp_path / "nowhere")],
        ["verify", "--banana"],
        ["export", str(tmp_path / "empty"), str(tmp_path / "out"), "--format", "onnx"],
        ["export", str(tmp_path / "empty"), str(tmp_path / "out")],
        ["publish", str(tmp_path / "empty"), "notarepo"],
        ["publish", str(tmp_path / "nowhere"), "org/name"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), (arguments, said)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# ---------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"nsamples: many", "--nsamples many: a whole number is needed."),
        (b"nsamples: 3.5", "--nsamples 3.5: a whole number is needed."),
        (b"nsamples: yes", "--nsamples True: a whole number is needed."),
        (b"nsamples:", "--nsamples None: a whole number is needed."),
        (b"nsamples: [8]", "--nsamples [8]: a whole number is needed."),
        (b"nsamples: {a: {b: 1}}", "--nsamples {'a': {'b': 1}}: a whole number is needed."),
        (b"lr: .nan", "--lr nan: a number above 0"),
        (b"lr: " + b"9" * 4000, "--lr 999"),
        (b"ignore: lm_head", "--ignore lm_head: a list, each of it text, [lm_head] in YAML, is needed."),
        (b"ignore: [1]", "--ignore [1]: a list, each of it text, is needed."),
        (b"tasks: []", "--tasks: an empty list will not do"),
        (b"block: 64", "--block 64: text (in YAML, in quotes) is needed."),
        (b"pattern: 2:4", "--pattern 124: text (in YAML, in quotes) is needed."),
        (b"revision: 2024-01-01", "text (in YAML, in quotes) is needed."),
        (b'output: "a\\0b"', "it holds a character that is none of a text."),
        (b"sequential: maybe", "--sequential maybe: true or false is needed."),
        (b"banana: 1", "banana is not a flag of armor"),
        (b"1: 2", "1 is not a flag of armor"),
        (b"config: other.yaml", "config is not a flag of armor"),
        (b"- nsamples", "a YAML mapping from names to values is needed."),
        (b"nsamples", "a YAML mapping from names to values is needed."),
        (b"", "a YAML mapping from names to values is needed."),
        (b"nsamples: 3\nnsamples: 4", "it says nsamples twice"),
        (b"nsamples: 3\nlr: {a: 1, a: 2}", "it says a twice"),
        (b"a: b: c", "not a YAML file (mapping values are not allowed here)."),
        (b"\xff\xfe", "it is not UTF-8 text"),
        (b"nsamples: \x00", "not a YAML file"),
        (b"nsamples: 2024-99-99", "not a YAML file"),
        (b"nsamples: " + b"9" * 5000, "not a YAML file"),
        (b"nsamples: !!python/object/apply:os.system [ls]", "not a YAML file"),
        (b"nsamples: &a [*a]", "...]]]]]]]: a whole number is needed."),
        (b"[" * 500, "not a YAML file"),
        (b"#" * (1 << 21), "a YAML mapping from names to values is needed."),
        (b"{[1, 2]: 3}", "not a YAML file"),
    ],
)
def test_an_odd_config_is_refused_in_one_sentence(tmp_path, content, says):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        parse("armor", ["--config", str(tmp_path / "c.yaml")])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_holds_what_flags_hold(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "\ufefflr: 1e-4\nmax_overhead: 5.0e-1\nnsamples: 8\nignore: []\nrevision: null\n", "utf-8"
    )
    recipe = parse("armor", ["--config", str(tmp_path / "c.yaml"), "--nsamples", "9"])
    assert (recipe.lr, recipe.max_overhead, recipe.nsamples, recipe.ignore) == (1e-4, 0.5, 9, [])
    (tmp_path / "c.yaml").write_text("lr: 1\nbaselines: [none]\nsequential: true")
    recipe = parse("armor", ["--config", str(tmp_path / "c.yaml"), "--no_resume", "--lr", "0.5"][:2])
    assert recipe.lr == 1.0 and isinstance(recipe.lr, float) and recipe.sequential and recipe.baselines == ["none"]
    assert parse("kvtuner", ["--no_prune", "--group_size", "-1"]).prune is False


@pytest.mark.parametrize("name", recipe_names())
def test_the_papers_settings_and_their_own_yaml_are_read_back(name, tmp_path):
    for recipe in (parse(name, []), parse(name, ["--paper"])):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.settings(), sort_keys=False))
        assert parse(name, ["--config", str(tmp_path / "recipe.yaml")]).settings() == recipe.settings()


def test_a_yaml_file_that_is_not_a_config_names_its_own_flag(tmp_path):
    (tmp_path / "table.yaml").write_text("[1]")
    with pytest.raises(UserError, match=re.escape(f"--energy_table {tmp_path}/table.yaml: a YAML mapping")):
        parse("lpvit", ["--energy_table", str(tmp_path / "table.yaml")]).check()
    with pytest.raises(UserError, match="--energy_table"):
        read_yaml(tmp_path / "no.yaml", "--energy_table")
