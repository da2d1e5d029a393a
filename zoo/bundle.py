"""Write the runtime's own source into a checkpoint folder, so that it loads where slimzoo is not installed.

transformers copies only flat .py files reached by one-level relative imports. So each module of this package that a
model file needs becomes a sibling with a prefix (zoo/kernels/ops.py -> slimzoo_kernels_ops.py) in which only the
module paths of relative imports differ. This file is itself bundled: in a bundle the siblings are already flat, and
writing them elsewhere is a copy, so a model loaded with trust_remote_code carries its code along when saved.
"""

import ast
import re
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_imports, get_relative_imports

from .kernels.sources import all_sources, source

PREFIX = "slimzoo_"
ALLOWED_IMPORTS = {"huggingface_hub", "numpy", "safetensors", "torch", "transformers"} | sys.stdlib_module_names
SOURCES_MODULE = "kernels.sources"  # reads the .cpp files of the package; in a bundle it holds their text


def bundle_stem(module: str) -> str:
    """The file stem, and module name, in a bundle of a module given by its full name (`cls.__module__`)."""
    return _flat(_local_name(module))


def write_bundle(folder: Path, module: str) -> list[Path]:
    """Write the source of `module` (a full name) and of all it imports from this package into `folder`, flat.

    Returns: the files written. Raises: ImportError naming the file if one of them cannot be bundled, because it
    imports something that is neither torch, transformers, safetensors, huggingface_hub, numpy nor standard library
    (outside of `try` and `if is_..._available()`), or because transformers would see other imports than Python does.
    """
    written, waiting = {}, [_local_name(module)]
    while waiting:
        name = waiting.pop()
        if name in written:
            continue
        text, imported = _flattened(name)
        written[name] = folder / f"{_flat(name)}.py"
        written[name].write_bytes(text.encode())
        foreign = set(get_imports(written[name])) - ALLOWED_IMPORTS
        if foreign:
            raise ImportError(f"{name} imports {', '.join(sorted(foreign))}: bundled files may not, a guard is needed.")
        if set(get_relative_imports(written[name])) != {_flat(other) for other in imported}:
            raise ImportError(f"{name} has text that transformers mistakes for an import, or an import it overlooks.")
        waiting += imported
    return list(written.values())


def _local_name(module: str) -> str:
    """`models.llama` for zoo.models.llama; slimzoo_models_llama for the same module in a bundle."""
    return module.removeprefix(f"{__package__}.")


def _flat(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name.replace(".", "_")


def _flattened(name: str) -> tuple[str, list[str]]:
    """The text of a module as it stands in a bundle, and the names of the modules of this package that it imports."""
    path = Path(__file__).parent.joinpath(*name.split("."))
    is_package = path.is_dir()
    file = path / "__init__.py" if is_package else path.with_suffix(".py")
    if name == SOURCES_MODULE:
        return _embedded_sources(), []
    lines = file.read_text(encoding="utf-8").split("\n")
    package = name.split(".") if is_package else name.split(".")[:-1]
    imported = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if node.module is None or node.level > len(package) + 1:
            raise ImportError(f"{name}, line {node.lineno}: only `from .module import name` can be bundled.")
        target = ".".join([*package[: len(package) + 1 - node.level], node.module])
        line = lines[node.lineno - 1].encode()  # ast counts columns in bytes
        start = line[: node.col_offset].decode()
        rest = re.sub(r"^from\s+[.\w]+", f"from .{_flat(target)}", line[node.col_offset :].decode())
        lines[node.lineno - 1] = start + rest
        imported.append(target)
    return "\n".join(lines), imported


def _embedded_sources() -> str:
    """A stand-in for the module that reads the kernels' C++ files: the same name, with the texts in it."""
    texts = ",\n".join(f"    {path!r}: {source(path)!r}" for path in all_sources())
    return f'''"""The C++ texts of the kernels, by their paths in the package."""

SOURCES = {{
{texts}
}}


def all_sources() -> list[str]:
    """Paths of all C++ files, relative to the kernels folder."""
    return sorted(SOURCES)


def source(path: str) -> str:
    """The text of one C++ file."""
    return SOURCES[path]
'''
