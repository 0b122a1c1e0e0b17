"""The published evaluations name data sets of the table, with the flags of the published scripts."""

from bd3lm_hf.data.packing import PACKINGS
from bd3lm_hf.data.sources import PUBLISHED, SUITES, Flags, find_spec, published_flags


def test_the_zero_shot_suite_has_the_eight_sets_of_the_paper():
    suite = SUITES["zero-shot"]
    assert len(suite.sets) == 8 and suite.length == 1024
    tests = {name for name, flags in suite.sets.items() if flags.split == "test"}
    assert tests == {"lm1b", "lambada", "ag_news"}
    for flags in suite.sets.values():
        assert flags._replace(split="") == Flags("", "published", insert_eos=False, insert_special=True)


def test_every_published_evaluation_is_one_of_a_known_data_set():
    for name, flags in [*PUBLISHED.items(), *SUITES["zero-shot"].sets.items()]:
        spec = find_spec(name)
        assert spec.name == name
        assert flags.split in spec.splits and flags.packing in PACKINGS


def test_in_domain_flags_are_those_of_the_data_set_or_the_published_defaults():
    assert published_flags("openwebtext") == Flags("validation", "published", True, False)
    assert published_flags("lm1b") == Flags("test", "published", True, True)
    assert published_flags("my.txt") == Flags("validation", "published", True, True)
