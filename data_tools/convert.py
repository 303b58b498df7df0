"""Converts training data from one toolkit's format into another's, or checks it.

    python -m data_tools.convert --from flag_embedding --to tevatron train.jsonl tevatron/
    python -m data_tools.convert --check train.jsonl
    python -m data_tools.convert --list

What the other format cannot hold is refused with its place, unless `--drop` names it. The output is put in its place
whole. docs/convert.md has the table of what each format holds.

Exit status: 0 done, 1 `--check` found something, 2 refused, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.command import stop
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError, RecordError

if TYPE_CHECKING:
    from data_tools.conversion import Conversion, Relocation
    from mmembed.data.format_base import Format


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.list:
            return _list()
        if options.input is None:
            raise ConfigError("name the input, or --list the formats")
        return _check(options) if options.check else _convert(options)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f"error: {error.filename or options.output}: {error.strerror}; nothing was written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130


def _parser() -> Parser:
    parser = Parser(prog="python -m data_tools.convert", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("input", type=Path, nargs="?", help="a file, or the folder of a format that is several files")
    parser.add_argument("output", type=Path, nargs="?", help="a file (.gz, .zst, ... compress it), or such a folder")
    parser.add_argument("--from", dest="source", metavar="FORMAT", help="of the input; found out where it is left out")
    parser.add_argument("--to", dest="target", metavar="FORMAT", help="of the output")
    parser.add_argument("--options", nargs="*", default=[], metavar="key=value", help="of the input's format")
    parser.add_argument("--to-options", nargs="*", default=[], metavar="key=value", help="of the output's format")
    parser.add_argument("--drop", metavar="a,b", help="what the output's format cannot hold and may be left out")
    parser.add_argument("--check", action="store_true", help="say what is wrong with the input, and write nothing")
    parser.add_argument("--list", action="store_true", help="print what each format holds, and do nothing else")
    parser.add_argument(
        "--on-bad-record", choices=("raise", "skip"), default="raise", help="end at a bad one, or leave it out"
    )
    parser.add_argument(
        "--media-root", type=Path, metavar="FOLDER", help="where paths start; default the input's folder"
    )
    parser.add_argument(
        "--media",
        choices=("resolve", "keep"),
        default="resolve",
        help="write paths so that they are right from the output's folder, or as they are",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    return parser


def _list() -> int:
    from data_tools.conversion import table

    print(table())
    return 0


def _check(options: argparse.Namespace) -> int:
    from data_tools.conversion import Conversion, allowed_of, writer_of

    for name, given in (("output", options.output), ("--overwrite", options.overwrite)):
        if given:
            raise ConfigError(f"{name}: --check writes nothing; remove one of them")
    writer = None if options.target is None else writer_of(options.target, _options(options.to_options))
    if writer is None and (options.drop or options.to_options):
        raise ConfigError("--drop, --to-options: they are about the output's format; name it with --to")
    allowed = frozenset[str]() if writer is None else allowed_of(options.drop, writer)
    reader = _reader(options)
    conversion = Conversion(reader, options.input, writer, allowed, skip=True, told=lambda error: print(error))
    try:
        for _ in conversion:
            pass
    except ConfigError as error:  # a file that ends in the middle
        print(error)
        conversion.bad["unreadable"] += 1
    print(f"{options.input}: {conversion.records:,} good records of format {reader.name}{_counted(conversion.bad)}")
    return 1 if conversion.bad else 0


def _convert(options: argparse.Namespace) -> int:
    from data_tools.conversion import Conversion, allowed_of, writer_of
    from mmembed.media import MediaStore
    from mmembed.staging import put_in_place, staging

    if options.target is None or options.output is None:
        raise ConfigError("name the output and its format (--to), or --check the input")
    writer = writer_of(options.target, _options(options.to_options))
    allowed = allowed_of(options.drop, writer)
    output: Path = options.output
    _free(output, options.input, options.overwrite)
    reader = _reader(options)
    base = options.media_root or _folder(options.input)
    relocation = _relocation(options, reader, base, output if writer.folder else output.parent)
    if writer.copies_pictures:
        relocation = None
    skip = options.on_bad_record == "skip"
    conversion = Conversion(reader, options.input, writer, allowed, skip, relocation, _tell)
    with staging(output) as work:
        work.mkdir(parents=True)
        made = work / output.absolute().name
        writer.write(made, iter(conversion), MediaStore(base, also=[_folder(options.input)]))
        if conversion.records == 0:
            raise ConfigError(f"{options.input}: no record could be converted{_counted(conversion.bad)}")
        put_in_place(made, output)
    print(_summary(conversion, relocation, output))
    return 0


def _relocation(options: argparse.Namespace, reader: Format, base: Path, home: Path) -> Relocation | None:
    """None where paths stay as they are."""
    from data_tools.conversion import Relocation
    from mmembed.data.format_base import WritableFormat

    inside = isinstance(reader, WritableFormat) and reader.copies_pictures  # its records name absolute paths
    if options.media == "keep" or (base.resolve() == home.resolve() and not inside):
        return None
    return Relocation(base, home)


def _reader(options: argparse.Namespace) -> Format:
    from data_tools.conversion import detected
    from mmembed.data.format_base import FORMATS

    if not options.input.exists():
        raise ConfigError(f"{options.input}: there is no such file or folder; check the path")
    name = options.source
    if name is None:
        name = detected(options.input)
        print(f"{options.input}: looks like {name}", file=sys.stderr)
    return FORMATS.build({"type": name, **_options(options.options)})


def _options(given: Sequence[str]) -> dict[str, Any]:
    """Values are read as YAML reads them."""
    import yaml

    found = {}
    for one in given:
        key, sign, value = one.partition("=")
        if not sign or not key:
            raise ConfigError(f"option '{one}': write key=value")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"option '{one}': not a value of YAML; quote it") from None
    return found


def _free(output: Path, source: Path, overwrite: bool) -> None:
    if output.exists() and output.resolve() == source.resolve():
        raise ConfigError(f"{output}: is the input; name another output")
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()) and output.is_dir():
        raise ConfigError(f"{output}: lies in the input; name another output")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: is there already; name another output, or replace it with --overwrite")


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _tell(error: RecordError) -> None:
    print(f"left out: {error}", file=sys.stderr)


def _summary(conversion: Conversion, relocation: Relocation | None, output: Path) -> str:
    lines = [f"{output}: {conversion.records:,} records{_counted(conversion.bad)}"]
    if conversion.dropped:
        counts = ", ".join(f"{name} ({count:,} records)" for name, count in conversion.dropped.most_common())
        lines.append(f"dropped: {counts}")
    if relocation is not None and relocation.absolute:
        root = os.path.commonpath([str(Path(file).parent) for file in relocation.absolute])
        lines.append(f"media are named by absolute paths now; to train on them set data.media_root={root}")
    return "\n".join(lines)


def _counted(bad: Counter[str]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad.most_common())
    return f"; bad: {kinds}" if kinds else ""


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)  # as Ctrl-C
    sys.exit(main())
