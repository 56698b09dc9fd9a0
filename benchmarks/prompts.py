"""Prompts of an exact length for the decoding benchmarks."""

from __future__ import annotations

from proxytune_kernels import Trio

# Darwin, On the Origin of Species (1859), introduction; public domain.
TEXT = """\
When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the \
distribution of the inhabitants of South America, and in the geological relations of the present \
to the past inhabitants of that continent. These facts seemed to me to throw some light on the \
origin of species - that mystery of mysteries, as it has been called by one of our greatest \
philosophers. On my return home, it occurred to me, in 1837, that something might perhaps be made \
out on this question by patiently accumulating and reflecting on all sorts of facts which could \
possibly have any bearing on it. After five years' work I allowed myself to speculate on the \
subject, and drew up some short notes; these I enlarged in 1844 into a sketch of the conclusions, \
which then seemed to me probable: from that period to the present day I have steadily pursued the \
same object. I hope that I may be excused for entering on these personal details, as I give them \
to show that I have not been hasty in coming to a decision. My work is now nearly finished; but \
as it will take me two or three more years to complete it, and as my health is far from strong, I \
have been urged to publish this Abstract.
"""

_STRIDE = 17  # tokens between the starts of two rows' prompts


def make_prompts(trio: Trio, batch_size: int, length: int) -> list[list[int]]:
    """Token ids [batch_size][length] of running English, another passage for each row."""
    text = trio.tokenizer.encode(TEXT, add_special_tokens=False)
    return [
        [text[(row * _STRIDE + i) % len(text)] for i in range(length)] for row in range(batch_size)
    ]
