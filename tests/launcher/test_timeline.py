from rich.console import Console

from launcher.timeline import Bar, bars, hidden_share, picture, render

APART = {
    "queue_s": 0.01,
    "prefill_queue_s": 0.01,
    "prefill_s": 0.06,
    "transfer_s": 0.02,
    "transfer_exposed_s": 0.005,
    "first_token_s": 0.09,
    "decode_s": 0.01,
    "transfer_bytes": 33_000_000,
    "transport": "shm",
    "prefill_worker": "prefill-0",
    "decode_worker": "decode-0",
    "cached_tokens": 0,
}
IN_PLACE = {**APART, "transport": "", "prefill_worker": "", "transfer_s": 0.0, "transfer_exposed_s": 0.0}


def test_phases_follow_each_other_on_the_requests_clock() -> None:
    spans = {bar.label: (round(bar.start_s, 6), round(bar.end_s, 6)) for bar in bars(APART)}
    assert spans == {
        "queue": (0.0, 0.02),
        "prefill": (0.02, 0.08),
        "transfer": (0.02, 0.085),
        "first token": (0.09, 0.09),
        "decode": (0.09, 0.1),
    }


def test_without_a_transfer_there_is_no_bar_for_it() -> None:
    assert "transfer" not in [bar.label for bar in bars(IN_PLACE)]


def test_what_was_hidden_is_what_did_not_delay() -> None:
    assert hidden_share(APART) == 0.75
    assert hidden_share(IN_PLACE) == 1.0
    assert hidden_share({"transfer_s": 0.01, "transfer_exposed_s": 0.02}) == 0.0


def test_a_span_is_drawn_to_scale() -> None:
    assert picture(Bar("", 0.0, 0.45, "", ""), 1.0, width=10).plain == "█████"
    assert picture(Bar("", 0.5, 0.75, "", ""), 1.0, width=10).plain == "     ███"
    assert picture(Bar("", 1.0, 1.0, "", ""), 1.0, width=10).plain == "         ◆"


def test_the_part_that_was_not_hidden_is_solid() -> None:
    assert picture(Bar("", 0.2, 0.9, "", "", exposed_from_s=0.6), 1.0, width=10).plain == "  ░░░░████"
    assert picture(Bar("", 0.2, 0.61, "", "", exposed_from_s=0.6), 1.0, width=10).plain == "  ░░░░░"


def test_a_request_that_took_no_time_can_be_drawn() -> None:
    nothing = {name: 0.0 if isinstance(value, float) else value for name, value in APART.items()}
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(nothing))
    console.file.close()


def test_it_tells_bytes_and_transport() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render(APART))
    assert "20.0 ms, 75% hidden; 33.0 MB by shm" in captured.get()


def test_it_tells_what_was_restored_and_fetched_instead_of_computed() -> None:
    told = {"restored_tokens": 4096, "restore_s": 0.0031, "fetched_tokens": 512, "fetch_s": 0.002}
    notes = {bar.label: bar.note for bar in bars({**APART, **told})}
    assert notes["prefill"] == "60.0 ms; 4,096 tokens restored in 3.1 ms; 512 tokens fetched in 2.0 ms"
    assert {bar.label: bar.note for bar in bars(APART)}["prefill"] == "60.0 ms"
