"""Medians, ratios and the bounds that they must keep."""

import statistics
from pathlib import Path


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def spread(runs, key):
    """The least and the most."""
    figures = [run[key] for run in runs]
    return [min(figures), max(figures)]


def summary(runs):
    """Median, least and most of each figure."""
    keys = [key for key, value in runs[0].items() if isinstance(value, (int, float))]
    return {key: {"median": median(runs, key), "spread": spread(runs, key)} for key in keys}


def add_summaries(cases):
    for case in cases.values():
        case["summary"] = {name: summary(runs) for name, runs in case["runs"].items() if runs}
        if case.get("ceilings"):
            at_best = {key: median(case["ceilings"], f"{key}_seconds") for key in ("net", "disk", "sha")}
            case["ceiling_seconds"] = {**at_best, "most": max(at_best.values())}


class Bounds:
    """Each bound of the goal, with what was measured: `None` where this run has not measured it."""

    def __init__(self, cases):
        self.cases = cases

    def of(self, case, contender, key="total_seconds"):
        found = self.cases.get(case, {}).get("summary", {}).get(contender, {}).get(key)
        return found and found["median"]

    def peers(self, case, key="total_seconds"):
        """Figures of those that verify nothing, the best first, with their names."""
        found = self.cases.get(case, {})
        names = [name for name in found.get("summary", {}) if name not in found["verifies"]]
        return sorted((self.of(case, name, key), name) for name in names)

    def against_best(self, case, key):
        best = self.peers(case, key)
        ours = self.of(case, "weightd", key)
        return (ours / best[0][0], f"÷ {best[0][1]}") if ours and best else (None, "")

    def against(self, case, peer):
        ours, theirs = self.of(case, "weightd"), self.of(case, peer)
        return ours / theirs if ours and theirs else None

    def against_ceiling(self, case):
        ceiling = self.cases.get(case, {}).get("ceiling_seconds")
        ours = self.of(case, "weightd")
        return (ours / ceiling["most"]) if ours and ceiling else None

    def peak_rss(self):
        peaks = []
        for name, case in self.cases.items():
            for contender, runs in case["runs"].items():
                if name != "startup" and contender.split("@")[0] == "weightd":
                    peaks += [run["peak_rss_mebibytes"] for run in runs]
        return max(peaks, default=None)

    def one_file(self):
        file, shards = self.of("file", "weightd"), self.of("shards", "weightd")
        if not (file and shards):
            return None
        return file / self.cases["file"]["bytes"] * self.cases["shards"]["bytes"] / shards

    def reading(self, way):
        return mount_ratio(self.cases["read"], f"{way}-warm") if "read" in self.cases else None

    def all(self):
        wall, wall_peer = self.against_best("shards", "total_seconds")
        cpu, cpu_peer = self.against_best("shards", "cpu_seconds_per_gigabyte")
        rows = [
            (f"8 shards over S3, wall with sync {wall_peer or '÷ fastest peer'}", wall, "<=", 0.75),
            ("8 shards over S3, wall with sync ÷ ceiling", self.against_ceiling("shards"), "<=", 1.25),
            (f"8 shards over S3, CPU s/GB {cpu_peer or '÷ leanest peer'}", cpu, "<=", 0.75),
            ("peak RSS at up to 64 connections, MiB", self.peak_rss(), "<=", 128),
            ("Hub, wall ÷ hf", self.against("hub", "hf"), "<=", 0.15),
            ("Hub, wall ÷ hf_transfer", self.against("hub", "hf_transfer"), "<=", 0.8),
            ("one file ÷ 8 shards", self.one_file(), "<=", 1.3),
            ("small files, wall ÷ s5cmd", self.against("small", "s5cmd"), "<=", 1.0),
            ("read through the mount ÷ plain file", self.reading("read"), ">=", 0.99),
            ("mmap through the mount ÷ plain file", self.reading("mmap"), ">=", 0.99),
            ("daemon start with a full store, s", self.of("startup", "weightd", "seconds"), "<=", 0.5),
            ("daemon start with a full store, RSS MiB", self.of("startup", "weightd", "peak_rss_mebibytes"), "<=", 64),
        ]
        return [
            {"what": what, "value": value, "sign": sign, "bound": bound, "kept": kept(value, sign, bound)}
            for what, value, sign, bound in rows
        ]


def mount_ratio(case, way):
    """The rate through the mount ÷ that of the plain file, of each pair of reads that followed each other."""
    plain, mount = (case["runs"][f"{way}-{place}"] for place in ("plain", "mount"))
    return statistics.median(each["seconds"] / other["seconds"] for each, other in zip(plain, mount))


def kept(value, sign, bound):
    if value is None:
        return None
    return value <= bound if sign == "<=" else value >= bound


def table(rows):
    """Rows of text in columns; the first row is the head."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def download_table(case):
    ours = case["summary"].get("weightd")
    rows = [("contender", "wall s", "+ sync", "total (min–max)", "weightd ÷ it", "CPU s/GB", "RSS MiB", "in memory")]
    order = sorted(case["summary"].items(), key=lambda item: item[1]["total_seconds"]["median"])
    for name, figures in order:
        least, most = figures["total_seconds"]["spread"]
        total = figures["total_seconds"]["median"]
        rows.append((
            name, f"{figures['seconds']['median']:.2f}", f"{figures['sync_seconds']['median']:.2f}",
            f"{total:.2f} ({least:.2f}–{most:.2f})",
            f"{ours['total_seconds']['median'] / total:.2f}" if ours else "",
            f"{figures['cpu_seconds_per_gigabyte']['median']:.2f}",
            f"{figures['peak_rss_mebibytes']['median']:.0f}", f"{figures['resident']['median']:.0%}",
        ))
    for key, value in case["ceiling_seconds"].items():
        ratio = f"{ours['total_seconds']['median'] / value:.2f}" if ours else ""
        rows.append((f"ceiling: {key}", "", "", f"{value:.2f}", ratio, "", "", ""))
    return table(rows)


def scaling_table(case):
    rows = [("contender", "connections", "MB/s (min–max)", "CPU s/GB", "RSS MiB")]
    for key, figures in case["summary"].items():
        name, connections = key.split("@")
        rate = case["bytes"] / 1e6
        least, most = figures["seconds"]["spread"]
        seconds = figures["seconds"]["median"]
        rows.append((
            name, connections, f"{rate / seconds:.0f} ({rate / most:.0f}–{rate / least:.0f})",
            f"{figures['cpu_seconds_per_gigabyte']['median']:.2f}", f"{figures['peak_rss_mebibytes']['median']:.0f}",
        ))
    return table(rows)


def startup_table(case):
    rows = [("figure", "median", "min", "max")]
    for key, figures in case["summary"]["weightd"].items():
        rows.append((key, f"{figures['median']:.3f}", *(f"{bound:.3f}" for bound in figures["spread"])))
    return table(rows)


def reading_table(case):
    rows = [("way", "plain GB/s", "mount GB/s", "mount ÷ plain")]
    for key in case["summary"]:
        if key.endswith("-plain"):
            way = key.removesuffix("-plain")
            plain, mount = (case["bytes"] / 1e9 / case["summary"][f"{way}-{place}"]["seconds"]["median"] for place in ("plain", "mount"))
            rows.append((way, f"{plain:.2f}", f"{mount:.2f}", f"{mount_ratio(case, way):.3f}"))
    return table(rows)


def hash_table(case):
    rows = [("SHA-256, GB/s", "one core", "all cores")]
    for name in case["ceilings"][0]["sha_gigabytes_per_second"]:
        figures = [ceiling["sha_gigabytes_per_second"][name] for ceiling in case["ceilings"]]
        rows.append((name, f"{median(figures, 'one_core'):.2f}", f"{median(figures, 'all_cores'):.2f}"))
    return table(rows)


def bounds_table(bounds):
    rows = [("bound", "measured", "wanted", "")]
    words = {True: "pass", False: "MISS", None: "not measured"}
    for row in bounds:
        value = "" if row["value"] is None else f"{row['value']:.2f}"
        rows.append((row["what"], value, f"{row['sign'].replace('=', '')}= {row['bound']}", words[row["kept"]]))
    return table(rows)


def text(result):
    parts = []
    tables = {"link": scaling_table, "startup": startup_table, "read": reading_table}
    for name, case in result["cases"].items():
        size = f", {case['bytes'] / 1e9:.2f} GB" if "bytes" in case else ""
        parts.append(f"{name}: {case['what']}{size}\n\n{tables.get(name, download_table)(case)}")
        parts += [f"{name}, profile of {who}:\n{profile}" for who, profile in (case.get("profile") or {}).items()]
        parts += [f"{contender} is out: {error}" for contender, error in case.get("failed", {}).items()]
    measured = [case for case in result["cases"].values() if case.get("ceilings")]
    if measured:
        parts.append(hash_table(measured[0]))
    parts.append(bounds_table(result["bounds"]))
    return "\n\n".join(parts)


def machine():
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo").read_text()
    field = lambda name: next((line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith(name)), "")
    return {
        "cpu": field("model name"),
        "cores": cpu.count("\nprocessor") + 1,
        "sha_instructions": "sha_ni" in field("flags").split() or "sha2" in field("Features").split(),
        "memory_bytes": int(Path("/proc/meminfo").read_text().split()[1]) << 10,
        "kernel": Path("/proc/sys/kernel/osrelease").read_text().strip(),
    }
