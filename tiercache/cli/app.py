"""The commands and their options. Each does its work elsewhere and prints here."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tiercache import __version__
from tiercache.cli import asking, contents, files, output, remote
from tiercache.cli import doctor as doctors
from tiercache.cli import warm as warming
from tiercache.cli.finding import GOOD, LIMITED, MISSING
from tiercache.cli.show import Show, WarmShow
from tiercache.errors import ConfigError
from tiercache.notation import format_size, parse_size
from tiercache.settings import config_path, load, read_machine

app = typer.Typer(
    name="tiercache",
    help="Cache data-lake files (and KV blocks) in memory and on SSD.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Directory = Annotated[str | None, typer.Option("--directory", "-d", help="The cache; default: as the settings say.")]

Options = Annotated[
    list[str] | None,
    typer.Option("-o", "--option", metavar="NAME=VALUE", help="For the origin's filesystem: endpoint_url=http://host"),
]

USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
"""The parser's own faults: click's ClickException, of which newer versions of typer carry a copy."""
MARKS = {GOOD: "[green]ok   [/]", LIMITED: "[yellow]limit[/]", MISSING: "[dim]none [/]"}


def run() -> int:
    """Parses the command line and does it; the exit code (see output)."""
    output.listen()
    result: object = output.GOOD
    with output.one_line_errors() as codes:
        try:
            result = app(standalone_mode=False)
        except typer.Exit as end:
            result = end.exit_code
        except typer.Abort:
            result = output.INTERRUPTED
        except USAGE_ERROR as error:
            output.console(errors=True).print(f"tiercache: {error.format_message()}", markup=False, soft_wrap=True)
            return output.USAGE
        if result == output.INTERRUPTED:  # what the parser makes of Ctrl-C
            raise KeyboardInterrupt
    return codes[0] if codes else result if isinstance(result, int) else output.GOOD


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Cache data-lake files (and KV blocks) in memory and on SSD."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def doctor(directory: Directory = None, as_json: Json = False) -> int:
    """Say what this machine gives the cache, what is missing, and what to do about it."""
    found = doctors.examine(directory)
    unusable = any(one.topic == "settings" for one in found)
    if as_json:
        output.print_json({"findings": [asdict(one) for one in found]})
        return output.FOUND if unusable else output.GOOD
    console = output.console()
    wide = max(len(one.topic) for one in found)
    for one in found:
        console.print(f"{MARKS[one.state]}  {one.topic:<{wide}}  {escape(one.fact)}", soft_wrap=True)
        if one.hint:
            console.print(" " * (wide + 9) + f"-> {one.hint}", markup=False, soft_wrap=True)
    return output.FOUND if unusable else output.GOOD


@app.command()
def config(directory: Directory = None, as_json: Json = False) -> None:
    """Show every setting: its value, where it comes from, what it means."""
    rows = load(directory=directory).explain()
    path = config_path(read_machine())
    if as_json:
        output.print_json({"file": path, "settings": [row._asdict() for row in rows]})
        return
    shown = [
        {
            "setting": row.name,
            "value": f"{row.value:,} ({format_size(row.value)})"
            if row.name.endswith("_bytes") and isinstance(row.value, int)
            else row.value,
            "from": row.source,
            "meaning": row.meaning,
        }
        for row in rows
    ]
    output.print_rows(shown)
    output.console().print(f"settings file: {path or 'none'}", markup=False, soft_wrap=True)


@app.command()
def stat(directory: Directory = None, as_json: Json = False) -> None:
    """Show how much the cache holds, against its caps, how well it is, and who uses it now."""
    settings = load(directory=directory)
    facts = asking.answered(settings, asking.stat, contents.stat)
    if "owner" not in facts:  # nobody has it open, so that the settings say what its caps will be
        facts |= {"memory": {"used_bytes": 0, "capacity_bytes": settings.memory_bytes}, "remote": remote.look(settings)}
    if as_json:
        output.print_json({"directory": settings.directory, **facts})
        return
    why = f" ({facts['reason']})" if facts["reason"] else ""
    lines = {
        "directory": settings.directory,
        "health": facts["health"] + why,
        "holds": f"{format_size(facts['held_bytes'])} in {facts['entries']:,} entries",
        "disk": disk_line(facts),
    }
    if facts["remote"] is not None:
        lines["remote"] = remote.line(facts["remote"], settings.remote_url)
    if settings.peers or facts.get("peers"):
        lines["peers"] = peers_line(facts.get("peers", []))
    names = {"page": "files", "block": "blocks", "lone": "objects"}
    for form, one in facts["forms"].items():
        lines[names[form]] = f"{one['keys']:,}, {format_size(one['held_bytes'])} in {one['entries']:,} entries"
    if "owner" in facts:
        lines |= _sharing_lines(facts)
    else:
        cap = format_size(facts["memory"]["capacity_bytes"])
        lines["memory"] = f"none in use, for no process has the directory open; its cap is {cap}"
    for name, text in lines.items():
        output.console().print(f"{name:<10} {text}", markup=False, soft_wrap=True)


def peers_line(peers: list[dict[str, Any]]) -> str:
    """Who is connected, and by what."""
    rows = [f"{one['name']} by {way_of(one)}, {format_size(one['received_bytes'])} came from there" for one in peers]
    return "; ".join(rows) or "none is connected now"


def way_of(peer: dict[str, Any]) -> str:
    """A transport, and what it takes."""
    same = peer["negotiated"] in ("", peer["transport"])
    return peer["transport"] if same else f"{peer['transport']} ({peer['negotiated']})"


def disk_line(facts: dict[str, Any]) -> str:
    """How full the SSD is; an owner that has none tells of its memory instead."""
    if not facts["ssd"]:
        return "none: the directory's owner has no SSD tier"
    used = f"{format_size(facts['used_bytes'])} of {format_size(facts['capacity_bytes'])}"
    return f"{used} in {facts['used_files']:,} of {facts['capacity_files']:,} files"


def _sharing_lines(facts: dict[str, Any]) -> dict[str, str]:
    """What only a living owner can say."""
    memory, owner = facts["memory"], facts["owner"]
    lines = {
        "memory": f"{format_size(facts['memory_bytes'])} held, {format_size(memory['used_bytes'])} of "
        f"{format_size(memory['capacity_bytes'])} in use",
        "owner": f"process {owner['pid']}",
    }
    for at, one in enumerate(owner["clients"]):
        who = f"process {one['pid']}" if one["pid"] else "a process of another PID namespace"
        me = " (this command)" if one["pid"] == os.getpid() else ""
        lines[f"client {at + 1}"] = f"{who}{me}: {one['leases']:,} leases on {format_size(one['pinned_bytes'])}"
    return lines


@app.command()
def ls(
    urls: Annotated[list[str] | None, typer.Argument(metavar="[URL]...", help="Files or folders.")] = None,
    options: Options = None,
    limit: Annotated[int, typer.Option(help="Rows at most; the largest first.", min=1)] = 50,
    full: Annotated[bool, typer.Option("--full", help="Whole keys, not what tells them apart.")] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """List what the cache holds: by key, or, with URLs, how much of each file is there."""
    settings = load(directory=directory)
    held = asking.answered(settings, asking.scan, contents.scan)
    if urls:
        found = files.named(settings, urls, files.parse_options(options or []))
        rows = contents.beside(held, [(one.path, one.size_bytes, one.key) for one in found])
    else:
        rows = [row.facts() for row in held]
    if as_json:
        output.print_json({"directory": settings.directory, "rows": rows})
        return
    if not urls and not full:
        short = output.shortened([row["key"] for row in rows])
        rows = [row | {"key": key} for row, key in zip(rows, short, strict=True)]
    output.print_rows(rows[:limit], wide=full)
    rest = f"; {len(rows) - limit:,} more (--limit)" if len(rows) > limit else ""
    output.console(errors=True).print(f"{len(rows):,} rows{rest}", markup=False)


@app.command()
def evict(
    urls: Annotated[list[str] | None, typer.Argument(metavar="[URL]...", help="Files or folders to forget.")] = None,
    options: Options = None,
    down_to: Annotated[str | None, typer.Option(help="The least recently used, until 10GiB, say, is left.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Forget everything.")] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Give space back: named files (as they are at their origin now), the least recently used, or everything."""
    if (bool(urls) + bool(down_to) + everything) != 1:
        raise ConfigError("evict: say what: URLs, --down-to SIZE, or --all")
    settings = load(directory=directory)
    keys, left = None, 0
    if urls:
        found = files.named(settings, urls, files.parse_options(options or []))
        keys = frozenset(one.key for one in found if one.key)
    elif down_to:
        size = parse_size(down_to)
        if size is None:
            raise ConfigError(f"--down-to {down_to}: give a size such as 10GiB")
        left = size
    facts = asking.answered(
        settings,
        lambda core: asking.evict(core, keys=keys, down_to=left),
        lambda tier: contents.evict(tier, keys=keys, down_to=left),
    )
    if as_json:
        output.print_json({"directory": settings.directory, **facts})
        return
    gone, stays = format_size(facts["evicted_bytes"]), format_size(facts["held_bytes"])
    output.console().print(f"gave back {gone} in {facts['evicted_entries']:,} entries; {stays} stay")


@app.command()
def fsck(
    repair: Annotated[bool, typer.Option("--repair", help="Drop what is damaged, revive what no row knows.")] = False,
    directory: Directory = None,
    as_json: Json = False,
) -> int:
    """Read every byte on SSD and say what is damaged; nothing is changed without --repair."""
    from tiercache.ssd.fsck import fsck as check

    settings = load(directory=directory)
    asking.refuse_when_open(settings)
    report = check(settings.directory, repair=repair, group=settings.share_group)
    facts = {**asdict(report), "clean": report.clean}
    if as_json:
        output.print_json(facts)
    else:
        held = f"{format_size(report.live_bytes)} in {report.records:,} records of {report.segments:,} segment files"
        output.console().print(f"{report.directory}: {held}", markup=False, soft_wrap=True)
        for name, value in facts.items():
            if value and name not in ("directory", "segments", "records", "live_bytes", "clean"):
                shown = "" if value is True else f"{value:,}"
                output.console().print(f"  {name.replace('_', ' ')} {shown}".rstrip())
        output.console().print("clean" if report.clean else "repaired" if repair else "damaged: see --repair")
    return output.GOOD if report.clean or repair else output.FOUND


@app.command()
def warm(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="Files or folders, such as s3://bucket/tables.")],
    options: Options = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Bring files into the cache ahead of their readers; a run that was stopped goes on where it was."""
    try:
        with WarmShow() as show:
            done = warming.warm(load(directory=directory), urls, files.parse_options(options or []), show)
    except KeyboardInterrupt:
        raise output.Stopped("stopped; run again to go on") from None
    if as_json:
        output.print_json(done.facts())
        return
    fetched = f"{format_size(done.fetched_bytes)} fetched in {done.origin_requests:,} requests"
    output.console().print(
        f"{done.files:,} files, {format_size(done.kept_bytes)} kept of {format_size(done.size_bytes)}; {fetched}",
        soft_wrap=True,
    )


@app.command()
def demo(
    *,
    url: Annotated[str, typer.Option(help="Your own Parquet instead, such as s3://bucket/tables.")] = "",
    endpoint: Annotated[str, typer.Option(help="With --url: the S3 endpoint.")] = "",
    s3: Annotated[str, typer.Option(help="The object store to start: own, ceph or moto.")] = "own",
    scale: Annotated[float | None, typer.Option(help="TPC-H scale factor; 1, or 0.01 with moto.", min=0.001)] = None,
    delay_ms: Annotated[float, typer.Option(help="Time to the first byte of each answer.", min=0)] = 30.0,
    mbps: Annotated[float, typer.Option(help="Megabytes a second of each connection; 0: unlimited.", min=0)] = 100.0,
    files_max: Annotated[int, typer.Option("--files", help="With --url: read at most so many files.", min=1)] = 8,
    directory: Annotated[str | None, typer.Option("--directory", "-d", help="Where tables and cache go.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cache and all results there.")] = False,
    as_json: Json = False,
) -> int:
    """Run 22 TPC-H queries in DuckDB over an object store: direct, cold, from SSD, from memory; compare all results."""
    from tiercache.testing.demo import run as demos

    work = Path(directory) if directory else default_work()
    factor = scale if scale is not None else (0.01 if s3 == "moto" else 1.0)
    plan = demos.Plan(work, s3, url, endpoint, factor, delay_ms, mbps, files_max, keep=keep)
    with Show() as show:
        report = demos.run(plan, show)
    if as_json:
        output.print_json(report.facts())
        return output.GOOD if report.good else output.FOUND
    console = output.console()
    console.print(report.table())
    for note in report.notes:
        console.print(note, markup=False, soft_wrap=True)
    for line in report.differences():
        console.print(line, markup=False, soft_wrap=True)
    console.print(report.verdict(), markup=False, soft_wrap=True)
    return output.GOOD if report.good else output.FOUND


def default_work() -> Path:
    """Where the demo keeps its tables: .cache of a checkout, else the user's cache directory."""
    here = Path.cwd()
    if (here / "pyproject.toml").is_file() and (here / "tiercache").is_dir():
        return here / ".cache"
    return Path(load().directory).parent / "tiercache-demo"
