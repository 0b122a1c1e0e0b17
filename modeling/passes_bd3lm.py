"""The network passes that write text block by block (arXiv 2503.09573, Algorithm 2): one per denoising step."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from .canvas_bd3lm import Canvas
from .packed_bd3lm import PackedLinears
from .schedules_bd3lm import LogLinearNoise
from .windows_bd3lm import open_window


class BlockPasses:
    """Runs a model over the blocks of a canvas.

    Args:
        cache: written to and read from; None computes the whole window in every pass.
        generation_config: says how the window moves, and whether a step is compiled.
    """

    def __init__(self, model: Any, canvas: Canvas, cache: Cache | None, generation_config: Any) -> None:
        self.model, self.block_size = model, canvas.block_size
        self.count = 0  # denoising passes so far
        self.modulations = None
        if not model.config.time_conditioning:
            self.modulations = model.backbone.modulations(None, canvas.text.device)
        self.linears = PackedLinears([*model.backbone.linears(), model.get_output_embeddings()])
        self.window = open_window(model, canvas, cache, generation_config, self.linears)
        self._running = list(range(len(canvas.text)))  # rows of the canvas that the network still runs on
        self._place: torch.Tensor | None = None  # of each row among those

    def logits(self, begin: int, rows: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """One denoising pass over the block that begins at this column.

        Args:
            rows: places that are predicted, flat indices into `(batch, block_size)`; none of a finished text.
            t: `(batch,)`, how much of each row's block is still masked: the probability 1 - alpha_t, which is the time
                of the log-linear schedule. Read only by time-conditioned models.

        Returns:
            `(rows, vocab_size)` in float32.
        """
        self.count += 1
        modulations = self.modulations
        if self._place is not None:
            rows = self._place[rows // self.block_size] * self.block_size + rows % self.block_size
        if modulations is None:
            t = t if self.window.rows is None else t[self.window.rows]
            modulations = self.model.backbone.modulations(LogLinearNoise().sigma(t), rows.device)
        hidden = self.window.hidden(begin, rows, modulations)
        return self.linears(self.model.get_output_embeddings(), hidden).float()

    def leave_out(self, finished: torch.Tensor) -> None:
        """Run the network without the texts that are finished, once they are at least half of those it runs on.

        Args:
            finished: bool `(batch,)` on the host.
        """
        ended = finished.tolist()
        kept = [number for number, row in enumerate(self._running) if not ended[row]]
        device = self.window.canvas.text.device
        if not 0 < 2 * len(kept) <= len(self._running) or not self.window.keep_rows(torch.tensor(kept, device=device)):
            return
        self._running = [self._running[number] for number in kept]
        place = torch.zeros(len(ended), dtype=torch.long)
        place[self._running] = torch.arange(len(kept))
        self._place = place.to(device)

    def close(self) -> Cache | None:
        """The cache, to be continued by a later call; empty if the window has moved or texts have been left out."""
        return self.window.close()


__all__ = ["BlockPasses"]
