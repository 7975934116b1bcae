"""Two lines of a log differ where a value does, not where one is older than the line or was no number in both."""

import pytest

from trainer.comparison import TOLERANCE, values

LOGSNR = "evenkeel_loss_by_logsnr"


def line(norm=2.0, middle=0.5, empty=0.25):
    return {
        "evenkeel_gradient_norm": norm,
        LOGSNR: {"logsnr=0": middle, "logsnr=9": empty},
        "evenkeel_samples_by_logsnr_ratio": {"logsnr=0": 1.0, "logsnr=9": 0.0},
    }


NAMES = ("evenkeel_gradient_norm", LOGSNR, "evenkeel_not_logged_then")


def test_the_same_bits_agree_and_the_next_float_does_not():
    assert values(line(), line(), NAMES, exact=True) == ([], 2)
    different, count = values(line(), line(norm=2.0000000000000004), NAMES, exact=True)
    assert different == ["evenkeel_gradient_norm: 2.0 logged, 2.0000000000000004 here"] and count == 2
    assert values(line(), line(norm=2.0000000000000004), NAMES, exact=False)[0] == []


def test_a_series_is_named_by_its_labels():
    (different,), _ = values(line(), line(middle=0.6), NAMES, exact=False)
    assert different.startswith(LOGSNR + "{logsnr=0}: 0.5 logged")


def test_a_bin_without_a_sample_holds_an_older_value_that_says_nothing():
    other = line()
    del other[LOGSNR]["logsnr=9"]
    assert (
        values(line(), other, NAMES, exact=True)[0] == []
        and values(line(empty=3.0), line(), NAMES, exact=True)[0] == []
    )


@pytest.mark.parametrize("exact", [True, False])
def test_what_was_no_number_then_must_be_none_now(exact):
    assert values(line(norm=None), line(norm=None), NAMES, exact)[0] == []
    assert len(values(line(norm=None), line(), NAMES, exact)[0]) == 1
    assert len(values(line(), line(norm=None), NAMES, exact)[0]) == 1
    assert len(values(line(), line(norm=2 * (1 + 2 * TOLERANCE)), NAMES, exact)[0]) == 1
