"""A third of the model types of transformers under our attention: equal to their own, or refused in so many words.

`python tests/integrations/sweep.py` takes all of them and prints what each came to.
"""

import pytest

pytest.importorskip("transformers", reason="needs the extra schoenbat[hf]")

from sweep import all_types, judge, quiet, share

pytestmark = pytest.mark.slow

THIRDS, PARTS = 3, 6


@pytest.mark.parametrize("part", range(PARTS))
def test_a_model_is_equal_to_itself_or_refused_and_never_sees_the_future(part: int) -> None:
    """In exact mode to 1e-4: causal masks, padding on either side, batches of 1 and 3, encoders with decoders, cross
    attention, in several steps from a cache, packed sequences; by each way to choose the implementation."""
    quiet()
    names = share(share(all_types(), 0, THIRDS), part, PARTS, salt="part")
    verdicts = [judge(name) for name in names]
    wrong = [str(verdict) for verdict in verdicts if verdict.wrong]
    assert not wrong, "\n".join(wrong)
    equal = [verdict.model_type for verdict in verdicts if verdict.state == "equal"]
    assert len(equal) >= len(names) // 5, "a sweep of models that do not build shows nothing"
