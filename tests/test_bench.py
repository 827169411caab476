"""The benchmark harness: its checks can fail, its arithmetic is right, its page renders."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # bench is part of the repository, not of what is installed

from bench import __main__ as bench_command  # noqa: E402
from bench import (  # noqa: E402
    commits,
    harness,
    latency,
    load,
    machine,
    plan,
    plots,
    producers,
    relay,
    report,
    targets,
    throughput,
    topologies,
)

from bus_support import wait_until  # noqa: E402
from tapebus import Publisher  # noqa: E402

TINY = plan.SIZES["tiny"]


def run_of(figures: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    """A run as its file has it."""
    results = plan.Results(repetitions=figures, **more)
    return {**machine.described(), "size": "tiny", "rounds": 1, **results.as_json()}


# -- the load ----------------------------------------------------------------------------------------------------


def test_the_mix_is_the_same_for_the_same_seed_and_has_its_shares() -> None:
    events = load.mix(7, 20_000)
    assert events == load.mix(7, 20_000) != load.mix(8, 20_000)
    counts = {name: sum(event[0] == name for event in events) for name in ("market_data", "signal_generated")}
    assert 0.88 < counts["market_data"] / 20_000 < 0.92
    assert 10 < counts["signal_generated"] < 100


def test_quotes_walk_so_that_hardly_one_is_like_another() -> None:
    quotes = [tuple(data.values()) for kind, data, _ in load.mix(7, 20_000) if kind == "market_data"]
    assert len(set(quotes)) > len(quotes) * 0.9


def test_every_lap_has_signals_of_new_names() -> None:
    events = load.mix(7, 2_000)
    names = [name for _, _, name in load.laps(events, 7_000) if name is not None]
    assert names and len(set(names)) == len(names)
    assert sum(1 for _ in load.laps(events, 7_001)) == 7_001


def test_levels_of_standing_signals_are_far_from_every_price_of_the_mix() -> None:
    prices: dict[str, list[float]] = {}
    for kind, data, _ in load.mix(7, 50_000):
        if kind == "market_data":
            prices.setdefault(data["symbol"], []).append(data["bid"])
    for _, data, _ in load.standing_signals(200):
        low, high = sorted((data["sl"], data["tp"]))
        assert low < min(prices[data["symbol"]]) and max(prices[data["symbol"]]) < high


def test_recorded_quotes_take_the_place_of_those_that_walk_and_none_comes_twice(tmp_path: Path) -> None:
    file = tmp_path / "ticks.jsonl"
    bids = [1.0 + n / 1000 for n in range(50)]
    line = {"event_type": "market_data", "timestamp": 1_700_000_000.0, "source": "recorded"}
    file.write_text(
        "".join(json.dumps({**line, "data": {"symbol": "EURUSD", "bid": bid, "ask": 2.0}}) + "\n" for bid in bids)
    )
    events = load.recorded([str(file)], 7, 1_000)
    assert [data["bid"] for kind, data, _ in events if kind == "market_data"] == bids
    assert [event for event in load.mix(7, len(events)) if event[0] != "market_data"] == [
        event for event in events if event[0] != "market_data"
    ]


@pytest.mark.parametrize("change", ["one is missing", "two are swapped", "a value differs"])
def test_the_digest_changes_when(change: str) -> None:
    events = load.mix(7, 100)
    other = list(events)
    if change == "one is missing":
        del other[50]
    elif change == "two are swapped":
        place = next(i for i in range(50, 99) if other[i] != other[i + 1])
        other[place], other[place + 1] = other[place + 1], other[place]
    else:
        place = next(i for i in range(50, 99) if other[i][0] == "market_data")
        other[place] = ("market_data", {**other[place][1], "bid": other[place][1]["bid"] + 0.01}, None)

    def digest(sent: list[load.Event]) -> int:
        found = 0
        for event in sent:
            found = load.digest_sent(found, event)
        return found

    assert digest(events) != digest(other)


# -- a real bus --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bus(request: pytest.FixtureRequest) -> harness.Bus:
    made = harness.Bus([topologies.TALLY], standing=10)
    request.addfinalizer(lambda: made.__exit__())
    return made


def test_a_run_through_each_way_in_is_checked_and_measured(bus: harness.Bus) -> None:
    for kind, batch in (("publisher", 1), ("msgpack", 10), ("json", 1)):
        sent = [
            replace_source(each, f"bench-{kind}-{number}")
            for number, each in enumerate(harness.loads(bus, kind, 1, 1_000, batch=batch))
        ]
        figures = harness.drive(bus, sent)
        assert figures["events_per_s"] > 0 and figures["bus_cpu_us_per_event"] > 0
        assert 10 < figures["rss_peak_mb"] < 1000
    throughput.check_open(bus, 10)
    with pytest.raises(harness.Wrong, match="signals are open"):
        throughput.check_open(bus, 100_000)


def replace_source(sent: producers.Load, source: str) -> producers.Load:
    sent.source = source
    return sent


def test_an_event_that_does_not_come_is_noticed(bus: harness.Bus) -> None:
    sent = producers.Load("publisher", bus.ipc, 1_000, "bench-short")
    with Publisher(sent.source, bus.ipc) as publisher:
        for event_type, data, correlation_id in load.mix(1, 999):
            publisher.publish(event_type, data, correlation_id)
        assert publisher.flush(30.0)
    with pytest.raises(harness.Wrong, match=r"of \{'bench-short': 1000\} events only"):
        bus.settle({sent.source: 1_000}, patience=0.2)
    bus.settle({sent.source: 999})
    digest = 0
    for event in load.mix(1, 999):
        digest = load.digest_sent(digest, event)
    harness.check_tape(bus.data_dir, {sent.source: (999, digest)})
    harness.check_probes(bus, {sent.source: (999, digest)})
    with pytest.raises(harness.Wrong, match="999 of 1,000 events of bench-short on the tape"):
        harness.check_tape(bus.data_dir, {sent.source: (1_000, digest)})
    with pytest.raises(harness.Wrong, match="on the tape are not what was sent"):
        harness.check_tape(bus.data_dir, {sent.source: (999, digest + 1)})
    with pytest.raises(harness.Wrong, match="in tally are not what was sent"):
        harness.check_probes(bus, {sent.source: (999, digest + 1)})


def test_a_refused_event_spoils_the_run() -> None:
    with harness.Bus(standing=0) as bus:
        harness.check_books(bus)
        with Publisher("bench-bad", bus.ipc) as publisher:
            publisher.publish("market_data", {"symbol": "EURUSD", "bid": "no price", "ask": 1.0})
            assert publisher.flush(30.0)
        bus.settle({"bench-bad": 1})
        with pytest.raises(harness.Wrong, match="dead_letters"):
            harness.check_books(bus)


def test_a_bus_that_dies_is_reported_and_not_waited_for() -> None:
    with harness.Bus(standing=0) as bus:
        bus.process.kill()
        with pytest.raises(harness.Wrong, match=r"bench\.bus ended"):
            bus.ask("stats")


def test_commits_are_counted_and_keep_the_distance_they_are_given():
    # a hundred events, one a millisecond: two commits more than fit into that time belong to its two ends
    assert 0 < latency.through(commit_interval_ms=50)(TINY)["commits_per_s"] <= 1 / 0.05 + 2 / 0.1


def test_a_relay_that_is_measured_beside_the_bus_has_sent_and_has_more_to_send() -> None:
    pytest.importorskip("telegram", reason="sending is an extra of the Telegram plugin")
    assert relay.busy(TINY)["p50_ms"] > 0


@pytest.mark.parametrize("bench", commits.BENCHES, ids=lambda bench: bench.name)
def test_each_way_to_commit_leaves_all_its_records(bench):
    assert bench.run(TINY)["cpu_us"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux is asked to end them")
def test_no_bus_outlives_a_run_that_is_killed() -> None:
    script = (
        "import os, sys; sys.path.insert(0, '.'); from bench.harness import Bus; "
        "print(Bus(standing=0).process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    bus = int(ran.stdout)
    wait_until(lambda: not alive(bus), "the bus to end with its harness")


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("shape", [topologies.pipeline, topologies.diamond], ids=["pipeline", "diamond"])
def test_a_shape_checks_its_answer(shape: Any) -> None:
    assert shape(replace(TINY, topology_events=1_000))["events_per_s"] > 0


# -- the run -----------------------------------------------------------------------------------------------------


def test_benchmarks_take_turns_and_keep_what_was_wrong_or_skipped_apart() -> None:
    order: list[str] = []

    def good(size: plan.Size) -> plan.Figures:
        order.append("good")
        return {"events_per_s": float(len(order))}

    def once(size: plan.Size) -> plan.Figures:
        order.append("once")
        return {"x_ms": 1.0}

    def wrong(size: plan.Size) -> plan.Figures:
        raise harness.Wrong("an event is missing")

    def skipped(size: plan.Size) -> plan.Figures:
        raise harness.Skipped("not installed")

    results = plan.Results()
    benches = [
        plan.Bench("good", "", good),
        plan.Bench("wrong", "", wrong),
        plan.Bench("skipped", "", skipped),
        plan.Bench("once", "", once, rounds=False),
    ]
    plan.run(benches, replace(TINY, rounds=3), lambda *_: None, results)
    assert order == ["good", "once", "good", "good"]
    assert results.repetitions["good.events_per_s"] == [1.0, 3.0, 4.0]
    assert results.wrong == {"wrong": "an event is missing"} and results.skipped == {"skipped": "not installed"}
    assert results.as_json()["figures"]["good.events_per_s"]["best"] == 4.0


def test_names_choose_benchmarks_by_beginning_and_pattern() -> None:
    benches = topologies.benches(TINY)
    assert [each.name for each in plan.chosen(benches, ["batch-", "*-to-five"])] == [
        "one-to-five",
        "four-to-five",
        "batch-1",
        "batch-10",
    ]
    assert plan.chosen(benches, []) == benches


def test_the_command_measures_prints_and_writes_the_run(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "bench", "--tiny", "--only", "push-msgpack", "--json", str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    assert "to disk and five plugins: PUSH, MessagePack" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 130
    found = json.loads(file.read_text())
    assert found["figures"]["push-msgpack.events_per_s"]["median"] > 0
    assert {"machine", "versions", "commit", "date", "load_before"} <= found.keys()
    again = subprocess.run(
        [sys.executable, "-m", "bench", "show", str(file)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert again.stdout.splitlines()[2:] and again.stdout.splitlines()[2] in ran.stdout


def test_an_interrupted_run_keeps_the_figures_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(benches: Any, size: Any, tell: Any, results: plan.Results) -> None:
        results.add("latency", {"p50_ms": 1.5})
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run", interrupted)
    file = tmp_path / "run.json"
    done = CliRunner().invoke(bench_command.main, ["--tiny", "--json", str(file)])
    assert done.exit_code == 130 and "interrupted" in done.output
    assert json.loads(file.read_text())["figures"]["latency.p50_ms"]["median"] == 1.5


def test_the_list_keeps_to_a_hundred_columns_and_names_each_once() -> None:
    benches = bench_command.everything(TINY, plan.Results(), [])
    shown = CliRunner().invoke(bench_command.main, ["--tiny", "--list"]).output.splitlines()
    assert max(map(len, shown)) <= 100
    assert [line.split()[0] for line in shown if not line.startswith(" ")] == [bench.name for bench in benches]


@pytest.mark.parametrize("command", ["show", "plots", "render"])
@pytest.mark.parametrize("text", ["no JSON", "[]", '{"a": 1}'])
def test_a_file_that_is_no_run_is_refused_in_words(tmp_path: Path, command: str, text: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    done = CliRunner().invoke(bench_command.main, [command, str(file)])
    assert done.exit_code == 2 and "is no run" in done.output


def test_a_page_without_markers_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    file, page = tmp_path / "run.json", tmp_path / "page.md"
    file.write_text(json.dumps(run_of(FULL)))
    page.write_text("# No markers\n")
    done = CliRunner().invoke(bench_command.main, ["render", str(file), "--page", str(page)])
    assert done.exit_code == 2 and "has no lines" in done.output
    assert sorted(tmp_path.iterdir()) == [page, file]


def test_tables_in_a_pipe_end_without_spaces(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_of(FULL)))
    lines = CliRunner().invoke(bench_command.main, ["show", str(file)]).output.splitlines()
    assert "batch-100.events_per_s" in "".join(lines)
    assert [line for line in lines if line != line.rstrip()] == []


# -- targets and the page ----------------------------------------------------------------------------------------


def test_a_target_is_judged_by_the_median_and_a_ratio_round_by_round() -> None:
    run = run_of(
        {
            "publisher.events_per_s": [600_000.0, 800_000.0, 650_000.0],
            "peer:redis-everysec.events_per_s": [50_000.0, 100_000.0, 50_000.0],
            "floor:publisher-decode.events_per_s": [2_000_000.0] * 3,
            "floor:publisher-commit.events_per_s": [1_000_000.0] * 3,
            "floor:json-decode.events_per_s": [500_000.0] * 3,
            "idle.cpu_percent": [0.1],
        }
    )
    found = {row.target.what.removeprefix("… "): row for row in targets.rows(run)}
    publisher = found["to disk and five plugins: Publisher"]
    assert (publisher.median, publisher.best) == (650_000.0, 800_000.0)
    assert publisher.share == pytest.approx(650 / 700)
    assert found["÷ Redis Streams, AOF everysec"].median == 12.0
    assert found["÷ lowest floor"].median == pytest.approx(0.65)
    assert found["CPU of the idle bus"].share == pytest.approx(3.0)
    assert found["÷ NATS JetStream"].median is None and found["÷ NATS JetStream"].share is None
    assert report.reached(publisher) == "93%"
    assert report.reached(found["CPU of the idle bus"]) == "yes"
    assert report.reached(found["÷ NATS JetStream"]) == "not run"


def test_peers_and_floors_stand_beside_the_way_in_that_they_belong_to() -> None:
    run = run_of(
        {
            "publisher.events_per_s": [600_000.0, 800_000.0],
            "push-json.events_per_s": [300_000.0, 400_000.0],
            "peer:redis-everysec.events_per_s": [50_000.0, 80_000.0],
            "peer:redis-everysec.p50_ms": [0.2, 0.2],
            "floor:json-decode.events_per_s": [3_000_000.0, 4_000_000.0],
        },
        peers={"peer:redis-everysec": {"version": "redis 7", "kind": "durable", "promise": "a second at risk"}},
    )
    assert report.peer_cells(run) == [
        ["peer:redis-everysec", "durable", "65,000", "80,000", "11.0", "0.200", ""],
        ["floor:json-decode", "", "3,500,000", "4,000,000", "0.100", "", ""],
    ]
    assert "- peer:redis-everysec: a second at risk" in report.markdown(run, [])
    assert "What a peer promises" not in report.markdown(run_of({"floor:json-decode.events_per_s": [1.0]}), [])
    assert not any("peer:" in line[0] for _, lines in report.sections(run) for line in lines)


def test_a_peer_that_is_not_here_is_skipped_and_one_that_fails_is_wrong() -> None:
    from bench.peers import Skipped

    with pytest.raises(harness.Skipped, match="not installed"), throughput.translated():
        raise Skipped("not installed")
    with pytest.raises(harness.Wrong, match="ConnectionError: gone"), throughput.translated():
        raise ConnectionError("gone")


def test_what_is_not_quite_reached_is_never_shown_as_reached() -> None:
    target = targets.Target("", "x.events_per_s", "", least=1000)
    assert report.reached(targets.Row(target, 999.9, 999.9)) == "99%"


@pytest.mark.parametrize(
    ("name", "unit", "best"),
    [
        ("publisher.events_per_s", "events/s", 2.0),
        ("payload-100.mb_per_s", "MB/s", 2.0),
        ("latency.p50_ms", "ms", 1.0),
        ("publisher.bus_cpu_us_per_event", "µs/event", 1.0),
        ("idle.ready_s", "s", 1.0),
    ],
)
def test_unit_and_best_follow_from_the_name_of_a_figure(name: str, unit: str, best: float) -> None:
    assert (plan.unit(name), plan.best(name, [1.0, 2.0])) == (unit, best)


FULL = {
    **{f"batch-{n}.events_per_s": [n * 1e4] for n in (1, 10, 100)},
    **{f"signals-{n}.bus_cpu_us_per_event": [1.0 + n / 1e6] for n in (100, 100_000)},
    **{f"query-{n}.correlation_id_first_p50_ms": [1.0] for n in ("1M", "10M")},
    **{f"latency.{place}_ms": [0.5] for place in ("p50", "p99", "p999")},
}


def test_a_run_is_rendered_between_the_markers_and_nothing_else_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{report.BEGIN}\nold\n{report.END}\n\n## After\n")
    run = run_of(FULL, skipped={"peer:x": "not installed"})
    report.render(run, page, [("A plot", "plots/a.svg")])
    first = page.read_text()
    assert first.startswith("# Before\n\n") and first.endswith("\n\n## After\n") and "old" not in first
    assert "| batch-100.events_per_s | 1,000,000 | 1,000,000 | events/s | 1 |" in first
    assert "![A plot](plots/a.svg)" in first and "skipped: peer:x: not installed" in first
    report.render(run, page, [("A plot", "plots/a.svg")])
    assert page.read_text() == first
    page.write_text("no markers")
    with pytest.raises(ValueError, match="are missing"):
        report.render(run, page, [])


def test_the_short_table_compares_ours_with_what_was_run_beside_it() -> None:
    ours, redis = [400_000.0, 600_000.0], [100_000.0, 100_000.0]
    run = run_of({"publisher.events_per_s": ours, "peer:redis-always.events_per_s": redis})
    lines = report.in_short(run).splitlines()
    assert [line.split("|")[2:4] for line in lines[2:4]] == [[" 500,000 ", "  "], [" 100,000 ", " 5.00 × "]]
    assert report.fillable((ROOT / "README.md").read_text(), report.BEGIN, report.END)


def test_the_page_of_the_documentation_has_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    report.render(run_of(FULL), page, [])
    assert "## Figures to reach" in page.read_text()


def test_plots_are_the_same_bytes_for_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="belongs to the group `bench`, not to `test`")
    run = run_of(FULL)
    drawn = plots.draw(run, tmp_path / "a")
    assert {file.stem for _, file in drawn} == set(plots.PLOTS)
    plots.draw(run, tmp_path / "b")
    for _, file in drawn:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert len(file.read_bytes()) < 60_000


def test_plots_without_figures_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="belongs to the group `bench`, not to `test`")
    drawn = plots.draw(run_of({"batch-1.events_per_s": [1.0]}), tmp_path)
    assert [file.stem for _, file in drawn] == ["throughput-by-batch"]


def test_series_reads_steps_from_names() -> None:
    figures = run_of(FULL)["figures"]
    assert plots.series(figures, "query-", "correlation_id_first_p50_ms") == [(1e6, 1.0), (1e7, 1.0)]
    assert [x for x, _ in plots.series(figures, "batch-", "events_per_s")] == [1, 10, 100]
