"""The fuzzer itself: what it found once, it finds again."""

from tests.fuzz.mutate import mutant, mutants

SAMPLES = [b'{"a": 1}\n', b"x = [1, 2]\n"]


def test_a_number_makes_the_same_mutant_again() -> None:
    found = dict(mutants("kind", SAMPLES, 300))
    assert [mutant("kind", SAMPLES, number) for number in range(300)] == list(found.values())
    assert list(dict(mutants("kind", SAMPLES, 20)).values()) == list(found.values())[:20]
    assert list(dict(mutants("other", SAMPLES, 20)).values()) != list(found.values())[:20]


def test_most_mutants_differ() -> None:
    made = [data for _, data in mutants("kind", SAMPLES, 300)]
    assert len(set(made)) > 200
    assert sum(data in SAMPLES for data in made) < 30
    assert max(map(len, made)) > 10_000
