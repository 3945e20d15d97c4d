"""OWL's survey: one pass of the dense model counts each block's outliers, which decide the sparsity of its linears."""

import logging
from functools import partial

from streamslr.config import RunConfig
from streamslr.model.blockwise import BlockwiseModel
from streamslr.run.journal_writer import Journal
from streamslr.run.passes import Passes
from streamslr.spec.allocation import Allocation, allocate, as_json, from_json, in_words

log = logging.getLogger("streamslr")


def allocation_by_outliers(
    config: RunConfig, blockwise: BlockwiseModel, journal: Journal, passes: Passes
) -> Allocation:
    """Return the allocation by OWL: from the journal, or by a survey of all blocks, which is committed there.

    A survey that was interrupted begins again at block 0.
    """
    if journal.state.allocation is None:
        log.info("counting the outliers of %d blocks, which decide their sparsity", len(blockwise.block_names))
        outliers = _count_outliers(blockwise, passes)
        allocation = allocate(config, blockwise.linears, outliers)
        for name, linears in zip(blockwise.block_names, blockwise.linears, strict=True):
            log.info("%s becomes %s", name, in_words(allocation[linear] for linear in linears))
        cut = passes.agree()
        journal.commit_survey(outliers, as_json(allocation), passes.windows.micro_batch, cut.measured, cut.retries)
    assert journal.state.allocation is not None
    return from_json(journal.state.allocation, blockwise.linears)


def _count_outliers(blockwise: BlockwiseModel, passes: Passes) -> list[float]:
    """Pass the windows through all dense blocks; return the fraction of outliers in each."""
    outliers = []
    hidden = passes.retry("embed", partial(passes.embed, targets=False)).hidden
    for i in range(len(blockwise.block_names)):
        leaving, block, diagonals = passes.retry("survey", partial(passes.survey, i, hidden))
        outliers.append(passes.count_outliers(block, diagonals))
        hidden.drop()
        hidden = leaving
        passes.drop_block(i)
    hidden.drop()
    return outliers
