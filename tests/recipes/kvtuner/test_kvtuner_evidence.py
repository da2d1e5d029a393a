"""What KVTuner's reports show, held against a report of the first version that was made from the same finds."""

import pytest
from example_report import VERSION_1
from torch import zeros

from recipes.kvtuner.allocation import Group
from recipes.kvtuner.evidence import cache_findings
from recipes.kvtuner.state import Tuned
from recipes.kvtuner.tables import CacheFormat
from zoo.record.format import CARDS
from zoo.record.schema import check_report, read_report

MENU = ((8, 8), (4, 4), (4, 2))
FORM = CacheFormat("kivi", 32, 64)
TABLE = ((8, 8), (4, 2), (4, 2), (4, 4))
ARCHIVE = {  # invented
    ((8, 8),) * 4: (0.0012, 8.0),
    ((4, 4),) * 4: (0.0931, 4.0),
    ((4, 2),) * 4: (0.4237, 3.0),
    TABLE: (0.0613, 4.5),
    ((4, 2), (8, 8), (4, 2), (4, 2)): (0.5113, 4.25),
}
ERRORS = ((0.0049, 0.0842, 0.6034), (0.0183, 0.3312, 0.3191), (0.0129, 0.2011, 0.4672), (0.0107, 0.2207, 0.5133))


FOUND = Tuned(
    table=TABLE,
    picks={},
    archive=ARCHIVE,
    groups=[Group((0,), MENU[:2]), Group((1, 2), MENU), Group((3,), MENU[:2])],
    errors=[dict(zip(MENU, row, strict=True)) for row in ERRORS],
    baselines={},
    held=zeros(0),
    held_out={},
    seconds=849.25,
)


@pytest.fixture
def findings():
    random = ((8, 4), (4, 2), (4, 4), (4, 2))
    models = {"kvtuner": (TABLE, FORM), "KV4": (((4, 4),) * 4, FORM), "random": (random, FORM)}
    kls = {"kvtuner": 0.0712, "KV4": 0.1045, "random": 1.3598}
    return cache_findings(FOUND, models, kls, menu=MENU, objective="kl", kv_heads=3, head_dim=64)


def test_findings_are_those_of_the_first_version(findings):
    report = read_report(VERSION_1 / "report.json")
    for part, found in findings.items():
        assert found.items() <= report[part].items() if part != "footprint" else found == report[part], part
    assert findings.keys() == {"tables", "figures", "footprint", "settings"}
    check_report(report | findings)


def test_committed_reports_have_the_same_parts(findings):
    committed = read_report(CARDS / "smollm2-135m-instruct-kvtuner" / "report.json")
    for part, found in findings.items():
        assert found.keys() <= committed[part].keys(), part
    for stem, figure in findings["figures"].items():
        assert figure.keys() == committed["figures"][stem].keys(), stem
    for title, table in findings["tables"].items():
        assert (
            table["header"] == committed["tables"][title]["header"]
            and table.keys() == committed["tables"][title].keys()
        )
    form = findings["settings"]["kv_cache_quantization"]
    assert form.keys() == committed["settings"]["kv_cache_quantization"].keys()


def test_what_was_found_at_each_budget_stands_beside_the_best_uniform_table(findings):
    assert "Best found at each budget" not in findings["tables"]  # nothing was measured on held-out windows
    uniform = [((4, 2),) * 4, ((4, 4),) * 4]
    picks = {3.0: [uniform[0]], 4.5: [TABLE], 2.0: []}
    found = FOUND._replace(picks=picks, held_out={uniform[0]: 0.41, uniform[1]: 0.1, TABLE: 0.07})
    models = {"kvtuner": (TABLE, FORM)}
    tables = cache_findings(found, models, {"kvtuner": 0.07}, menu=MENU, objective="kl", kv_heads=3, head_dim=64)[
        "tables"
    ]
    assert tables["Best found at each budget"]["rows"] == [
        ["3", "K4V2", "3.00", "0.4100", "K4V2", "3.00", "0.4100"],
        ["4.5", "mixed", "4.50", "0.0700", "KV4", "4.00", "0.1000"],
    ]


def test_an_objective_with_a_name_of_its_own_labels_the_axis_and_may_be_negative(findings):
    assert findings["figures"]["cache_front"]["panels"][0]["log"] == "y"
    found = Tuned(TABLE, {}, ARCHIVE | {TABLE: (-0.5, 4.5)}, [], [dict.fromkeys(MENU, 0.1)] * 4, {}, zeros(0), {}, 1.0)
    models, kls = {"kvtuner": (TABLE, FORM)}, {"kvtuner": 0.1}
    figure = cache_findings(found, models, kls, menu=MENU, objective="my:score", kv_heads=3, head_dim=64)["figures"]
    assert figure["cache_front"]["y"] == "my:score" and "log" not in figure["cache_front"]["panels"][0]
