#!/usr/bin/env python3
"""weightd, its peers and the ceilings of this machine, in one run; see README.md beside this file."""

import argparse
import functools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from rig import contenders, downloads, report, scaling, setup, store

CASES = [case.name for case in downloads.CASES] + ["link", "startup", "read"]


def words(text):
    return text.split(",")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=words, default=CASES, help=f"of {','.join(CASES)}")
    parser.add_argument("--contenders", type=words, help="only these; weightd is one (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the large models")
    parser.add_argument("--snapshots", type=int, default=store.SNAPSHOTS, help="in the store of the case startup")
    parser.add_argument("--dir", type=lambda text: Path(text).resolve(), help="on the disk to be measured (default: target/bench)")
    parser.add_argument("--data", type=Path, default=Path("/dev/shm"), help="in memory: what the origin serves")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--binaries", type=Path, help="directory of our binaries (default: build a release)")
    parser.add_argument("--no-fill", dest="fill", action="store_false", help="leave free memory as it is before a run")
    parser.add_argument("--profile", action="store_true", help="of each download case, also where the CPU goes (perf)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    options = parser.parse_args()
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no such case: {','.join(unknown)}")
    known = {each.name for each in contenders.contenders()}
    if options.contenders and set(options.contenders) - known:
        parser.error(f"contenders are {','.join(sorted(known))}")
    return options


def install(options):
    """All tools that the chosen cases need; what cannot be installed is left out of the run, and said."""
    target = (setup.ROOT / "target/bench").resolve()
    target.mkdir(parents=True, exist_ok=True)
    tools = {"nginx": setup.nginx(target), "weightd": setup.cargo(options.binaries)}
    for each in contenders.contenders():
        wanted = options.contenders is None or each.name in options.contenders
        if each.tool and wanted and needed(options, each):
            tools[each.name] = each.tool(target)
    return target, tools


def needed(options, contender):
    sources = {case.source for case in downloads.CASES if case.name in options.cases}
    return contender.sources & sources or contender.name == "s5cmd" and "link" in options.cases


def measure_all(options, target, tools):
    cases, result = {}, None
    with tempfile.TemporaryDirectory(prefix="work-", dir=options.dir or target) as work:
        with tempfile.TemporaryDirectory(prefix="weightd-bench-", dir=options.data) as data:
            rig = downloads.Rig(options, tools, Path(work), Path(data))
            ways = {case.name: functools.partial(downloads.run, case=case) for case in downloads.CASES}
            ways |= {"link": scaling.run, "startup": store.startup, "read": store.reading}
            for name in options.cases:
                cases[name] = ways[name](rig)
                # After each case: a run that is broken off has measured something.
                result = summarise(options, cases)
                if options.json:
                    options.json.write_text(json.dumps(result, indent=1))
    return result


def summarise(options, cases):
    report.add_summaries(cases)
    shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    bounds = report.Bounds(cases).all()
    return {"machine": report.machine(), "options": shown, "cases": cases, "bounds": bounds}


def main():
    options = arguments()
    try:
        target, tools = install(options)
    except setup.SetupError as error:
        sys.exit(f"error: {error}")
    if os.environ.get("WEIGHTD_BENCH_APART") != "1":
        # Ports, links and mounts of our own: nothing of this run is seen from outside, and nothing is left.
        apart = ["unshare", "--net", "--mount", "--propagation", "private"]
        if os.geteuid() != 0:
            apart += ["--user", "--map-root-user"]
        again = [*apart, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, *sys.argv]
        os.execvpe(again[0], again, {**os.environ, "WEIGHTD_BENCH_APART": "1"})
    # Else SIGTERM would leave gigabytes in memory, and the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    result = measure_all(options, target, tools)
    print(report.text(result))
    missed = [row for row in result["bounds"] if row["kept"] is False]
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
