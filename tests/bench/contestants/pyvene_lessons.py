"""Subspaces by pyvene's low-rank rotated intervention, in the loop that its tutorials write."""

from __future__ import annotations

from typing import Any

import pyvene
import torch
from lessons import Laps, Lesson
from subject import Subject
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrize import cached


def make(subject: Subject, last_logits: bool, recorded: bool) -> Rotation:
    """The library around that model."""
    return Rotation(subject, last_logits, recorded)


class Rotation:
    """Learns the basis of one intervention.

    Args:
        subject: the model.
        last_logits: whether the model gives the logits of the last token alone.
        recorded: whether source activations are recorded once, before the first step.
    """

    def __init__(self, subject: Subject, last_logits: bool, recorded: bool) -> None:
        self.model, self.recorded = subject.model, recorded
        self.more = {"logits_to_keep": 1} if last_logits else {}

    def learn(self, asked: Lesson, _: Any) -> dict[str, Any]:
        """Learn one subspace, and measure it on the test pairs."""
        laps = Laps()
        patched = self._intervened(asked)
        layer = patched.rotate_layer
        layer.weight = asked.initial
        seen = torch.cat([asked.train, asked.held_out])
        self.source = self._record(asked, seen) if self.recorded else None
        optimizer = torch.optim.AdamW(patched.parameters(), lr=asked.lr, weight_decay=0.0)
        losses: list[float] = []
        batches: list[list[int]] = []
        held_out: list[float] = []
        best = asked.initial
        with laps.lap("held_out"):
            held_out.append(self._loss(asked, asked.held_out))
        slope = None
        for order in asked.orders():
            for batch in order:
                if slope is None:
                    with laps.lap("aside"):
                        slope = self._slope(asked, batch, layer)
                with laps.lap("step"), torch.enable_grad():
                    for group in optimizer.param_groups:
                        group["lr"] = asked.rate(len(losses))
                    loss = cross_entropy(self._logits(asked, batch), asked.answers["source"][batch])
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(float(loss))
                batches.append(batch.tolist())
            with laps.lap("held_out"):
                held_out.append(self._loss(asked, asked.held_out))
            if held_out[-1] == min(held_out):
                best = layer.weight.detach().clone()
        laps.stop()
        layer.weight = best
        self.source = self._record(asked, asked.test) if self.recorded else None
        tops = torch.cat([self._logits(asked, some).argmax(-1) for some in asked.test.split(32)])
        return {
            "seconds": laps.parts,
            "losses": losses,
            "batches": batches,
            "slope": slope.tolist(),
            "basis": best.tolist(),
            "held_out_losses": held_out,
            "accuracy": float((tops == asked.answers["source"][asked.test]).double().mean()),
        }

    def _intervened(self, asked: Lesson) -> Any:
        """Wrap the model; gives its one intervention."""
        intervention = pyvene.LowRankRotatedSpaceIntervention(
            embed_dim=self.model.config.hidden_size,
            low_rank_dimension=asked.rank,
            # So that all positions share the basis.
            keep_last_dim=True,
        )
        where = pyvene.RepresentationConfig(
            layer=asked.layer,
            component="block_output",
            unit="pos",
            max_number_of_units=len(asked.positions),
            low_rank_dimension=asked.rank,
            intervention=intervention,
        )
        self.wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig([where]), self.model)
        self.wrapped.disable_model_gradients()
        return intervention

    def _given(self, asked: Lesson, run: str, pairs: Tensor) -> dict[str, Any]:
        mask = asked.masks[run][pairs]
        return {
            "input_ids": asked.tokens[run][pairs],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            **self.more,
        }

    def _logits(self, asked: Lesson, pairs: Tensor) -> Tensor:
        """The logits `[pairs, vocab]` at the last token of patched runs."""
        at = [[asked.positions] * len(pairs)]
        base = self._given(asked, "target", pairs)
        if self.source is None:
            given = [self._given(asked, "source", pairs)]
            _, output = self.wrapped(base, given, {"sources->base": (at, at)})
        else:
            kept = self.source[pairs]
            where = {"sources->base": (None, at)}
            _, output = self.wrapped(base, unit_locations=where, source_representations=kept)
        return output.logits[:, -1]

    @torch.enable_grad()
    def _slope(self, asked: Lesson, pairs: Tensor, layer: Any) -> Tensor:
        """The gradient of the mean loss by the basis `[width, rank]` itself."""
        # So that it is one tensor wherever it is used.
        with cached():
            basis = layer.weight
            loss = cross_entropy(self._logits(asked, pairs), asked.answers["source"][pairs])
        return torch.autograd.grad(loss, [basis])[0]

    def _loss(self, asked: Lesson, pairs: Tensor) -> float:
        """The mean loss of some pairs."""
        losses = [
            cross_entropy(self._logits(asked, some), asked.answers["source"][some], reduction="sum")
            for some in pairs.split(asked.batch_size)
        ]
        return float(sum(losses)) / len(pairs)

    def _record(self, asked: Lesson, pairs: Tensor) -> Tensor:
        """The source activations of some pairs, `[all pairs, positions, width]`; 0 of others."""
        size = len(asked.tokens["source"]), len(asked.positions), self.model.config.hidden_size
        kept = torch.zeros(size)

        def keep(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept[batch] = hidden[:, asked.positions]

        hook = self.model.model.layers[asked.layer].register_forward_hook(keep)
        for batch in pairs.split(asked.batch_size):
            self.model(**self._given(asked, "source", batch))
        hook.remove()
        return kept
