"""Alerts and dashboard: their queries, their runbooks, and that every metric exists. Run by deploy/check/run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

DEPLOY = Path(__file__).resolve().parents[1]
RULES = DEPLOY / "chart/files/rules.yaml"
DASHBOARD = DEPLOY / "chart/files/dashboard.json"
RUNBOOKS = DEPLOY / "runbooks.md"
README = DEPLOY.parent / "README.md"

failed = 0


def check(what, good, got=""):
    global failed
    if not good:
        failed += 1
        print(f"FAILED {what}: {got}", file=sys.stderr)


def described():
    """Metrics of the README's table, which a Rust test compares with the code, as they are scraped, with their labels."""
    table = README.read_text().split("<!-- metrics -->")[1].split("<!-- /metrics -->")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    for name, kind, labels, _ in ([cell.strip() for cell in row] for row in rows):
        name = name.strip("`")
        values = {}
        for label in filter(None, labels.split("; ")):
            key, each = label.split(": ")
            values[key] = set(each.split(", "))
        yield from ((name + ending, values) for ending in ("_bucket", "_count", "_sum") if kind == "histogram")
        if kind != "histogram":
            yield name, values


# What scraping adds, and what other programs of a cluster have.
SCRAPED = {"weightd", "namespace", "pod", "node", "le"}
OTHERS = {"up", "kube_daemonset_status_number_unavailable", "kube_pod_container_status_restarts_total",
          "apiserver_admission_webhook_fail_open_count"}
MATCHER = re.compile(r'(\w+)(=~|!=|!~|=)"([^"]*)"')


def query(where, expression, metrics):
    names = re.findall(r"\b(weightd_\w+|kube_\w+|apiserver_\w+|up)\b", expression)
    check(f"{where}: it asks for a metric", names, expression)
    for name in names:
        check(f"{where}: {name} exists", name in metrics or name in OTHERS, sorted(metrics))
    for name, matchers in re.findall(r"\b(weightd_\w+)\{([^}]*)\}", expression):
        for label, how, value in MATCHER.findall(matchers):
            labels = metrics.get(name, {})
            known = label in SCRAPED or label in labels
            check(f"{where}: {name} has the label {label}", known, labels)
            if how in ("=", "!=") and label in labels:
                check(f"{where}: {label} of {name} may be {value}", value in labels[label], labels[label])


def rules(metrics):
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    names = [rule["alert"] for rule in alerts]
    check("no alert has the name of another", len(set(names)) == len(names), names)
    headings = re.findall(r"^## (Weightd\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    check("runbooks are in the order of the alerts", headings == names, set(headings) ^ set(names))
    tested = (DEPLOY / "check/rules_test.yaml").read_text()
    for rule in alerts:
        name, notes = rule["alert"], rule["annotations"]
        query(name, rule["expr"], metrics)
        check(f"{name} links to its runbook", notes["runbook_url"] == f"deploy/runbooks.md#{name.lower()}", notes)
        check(f"{name} says what and why", {"summary", "description"} <= notes.keys(), notes)
        check(f"{name} has a severity", rule["labels"]["severity"] in ("warning", "critical"), rule)
        fires = re.search(rf"alertname: {name}\n\s+eval_time: \S+\n\s+exp_alerts:\n", tested)
        check(f"{name} is seen to fire in rules_test.yaml", fires)


def dashboard(metrics):
    board = json.loads(DASHBOARD.read_text())
    ids = [panel["id"] for panel in board["panels"]]
    check("panels have ids of their own", len(set(ids)) == len(ids), ids)
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            query(panel["title"], target["expr"], metrics)
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            query(variable["name"], variable["query"]["query"], metrics)
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def promtool(expressions):
    tool = os.environ.get("PROMTOOL")
    if not tool:
        print("check: SKIPPED promtool: it is not here (Debian: prometheus)")
        return
    # Grafana's own words stand for times; a rule per query lets promtool parse them all.
    plain = [re.sub(r"\$__(rate_interval|range)", "5m", text) for text in expressions]
    asked = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(plain)]
    panels = Path(os.environ["SCHEMAS"]) / "panels.yaml"
    panels.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    for arguments in (
        ["check", "rules", RULES],
        ["test", "rules", DEPLOY / "check/rules_test.yaml"],
        ["check", "rules", "--lint=none", panels],
    ):
        told = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=120, check=False)
        check(f"promtool {arguments[0]} {arguments[1]}", told.returncode == 0, told.stdout + told.stderr)


known = dict(described())
rules(known)
promtool(dashboard(known))
if failed:
    sys.exit(f"check: {failed} failed")
print("check: alerts and dashboard are good")
