"""benchmarks.generate: what its providers run, and the lines of results."""

from benchmarks import generate
from benchmarks.generate import make_providers
from benchmarks.harness.agreement import check_greedy
from benchmarks.harness.decoding import GREEDY


def test_greedy_providers_agree(trio):
    providers = make_providers(trio, GREEDY, 4, 32)
    assert check_greedy(providers) == []
    tokens = [provider.generate([[5, 6, 7]], 9).token_ids for provider in providers]
    assert len(tokens[0][0]) == 9
    assert all(found == tokens[0] for found in tokens)


def test_command(run_command, records_of, trio_directory):
    arguments = ("--trio", trio_directory, "--lengths", "4:5", "--repeats", 1)
    lines, _ = records_of(generate.main, *arguments)
    names = ["naive", "generate-warpers", "generate", "decoder"]
    assert [(r["batch_size"], r["provider"]) for r in lines] == [
        (rows, name) for rows in (1, 4) for name in names
    ]
    by_name = {line["provider"]: line for line in lines}
    assert "Nothing" in by_name["generate-warpers"]["path"]["sampling"]
    assert by_name["naive"]["path"] == by_name["decoder"]["path"] == {}
    assert lines[0]["sampling"] == {"alpha": 1.0, "temperature": 0.7, "top_p": 0.9}
    assert run_command(generate.main, "--lengths", "own:8").exit_code == 2
