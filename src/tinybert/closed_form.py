"""A student solved from its teacher by linear algebra, before any gradient step.

The student keeps the d' hidden units of its teacher that vary most over the mapped layers, so layer norm and
the skip connections still see single units. Then layer by layer, on the student's *own* activations so far:
ridge regression from them to the input of the teacher's layer g(m); per head the best low-rank factors of the
score matrix and of the value-output matrix under the data's second moments; the neurons of all the teacher's
layers above g(m-1) up to g(m) compete for the feed-forward block, whose output is re-solved; both layer
norms are fitted unit by unit. The head is pulled back through the same maps. Only second moments are kept, so
memory does not grow with the text; the states of the text wait on disk between the three passes a layer.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tinybert.anatomy import Batch, Encoder, assign, check_family, matrix
from tinybert.closed_head import solve_head
from tinybert.errors import InputError
from tinybert.moments import Moments, attention_factors, choose
from tinybert.spool import Spool, Spooled

# The basis is settled by far fewer tokens than the weights.
_BASIS_TOKENS = 20_000
# Neurons that may compete for a layer: moments and choice cost the square of their number.
_MOST_CANDIDATES = 4096

Batches = Sequence[Batch] | Callable[[], Iterable[Batch]]


@dataclass(frozen=True)
class ClosedFormResult:
    """What the solution leaves beside the student's weights.

    Attributes:
        projections: W_m (d', d) for the embeddings (0) and layers 1..M: the linear map without bias with the
            least |h_S W - h_T|^2 on the calibration text, where hidden losses should start.
        basis: (d',) sorted indices of the teacher's hidden units that the student keeps, P's columns.
        hidden_errors: For layers 0..M, sum |h_S W - h_T|^2 / sum |h_T - mean h_T|^2, calibration text.
    """

    projections: list[Tensor]
    basis: Tensor
    hidden_errors: list[float]


def _keep_one(weights: Tensor) -> Tensor:
    """Turn the map [x, 1] -> y, (p, k), into [x, 1] -> [y, 1], (p, k + 1)."""
    last = weights.new_zeros(len(weights), 1)
    last[-1] = 1.0
    return torch.cat([weights, last], 1)


class _Solver:
    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        batches: Batches,
        layer_map: tuple[int, ...],
        ridge: float,
        seed: int,
        folder: str,
    ) -> None:
        self.teacher, self.student = Encoder(teacher), Encoder(student)
        self.batches, self.layer_map, self.ridge = batches, layer_map, ridge
        self.spool = Spool(Path(folder))
        self.generator = torch.Generator().manual_seed(seed)
        self.basis = torch.arange(self.student.width)
        self.projections: list[Tensor] = []
        self.errors: list[float] = []

    def raw(self) -> Iterator[Batch]:
        yield from self.batches() if callable(self.batches) else self.batches

    def teach(self, states: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        """Run the teacher's layers first + 1 .. last."""
        for layer in self.teacher.layers[first:last]:
            states = layer.norm2(layer.feed(layer.norm1(layer.attend(states, mask))))
        return states

    def keep_units(self) -> None:
        """Choose the basis: the units with most variance over the mapped layers, each counting alike."""
        layers = (0, *self.layer_map)
        moments = [(torch.zeros(2, self.teacher.width, dtype=torch.float64)) for _ in layers]
        count = 0
        for batch in self.raw():
            mask = _mask(batch)
            states = self.teacher.embed(batch)
            for i, layer in enumerate(layers):
                states = self.teach(states, mask, layers[i - 1] if i else 0, layer)
                rows = states[mask].double()
                moments[i] += torch.stack([rows.sum(0), rows.square().sum(0)])
            count += int(mask.sum())
            if count >= _BASIS_TOKENS:
                break
        if count == 0:
            raise InputError("there is no calibration text: give some batches")
        share = torch.zeros(self.teacher.width, dtype=torch.float64)
        for total, square in moments:
            variance = square / count - (total / count).square()
            share += variance / variance.sum()
        self.basis = share.sort(descending=True, stable=True).indices[: self.student.width].sort().values

    def regress(self, moments: Moments, columns: slice) -> Tensor:
        """[x, 1] -> teacher states (d' + 1, d), shrunk towards "the kept units are right, the others 0"."""
        return moments.ridge(self.placed(self.student.width + 1), self.ridge, columns)

    def placed(self, rows: int) -> Tensor:
        """(rows, d): each student unit where it came from, P' with empty rows below."""
        prior = torch.zeros(rows, self.teacher.width, dtype=torch.float64)
        prior[torch.arange(self.student.width), self.basis] = 1.0
        return prior

    def settled(self, norm: nn.LayerNorm | None, rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Moments:
        """Fit a layer norm to the first d targets' kept units and return the moments of its output.

        ``rows`` yields (states after the norm, targets, weights), is read once, and must run with the norm's
        gain at 1 and bias at 0, as this function leaves them until the last row.
        """
        moments = Moments()
        if norm is not None:
            norm.weight.fill_(1.0)
            norm.bias.zero_()
        for states, targets, weights in rows:
            moments.add(states, targets, weights)
        if norm is None:
            return moments
        gain, bias = moments.norm(self.basis)
        norm.weight.copy_(gain)
        norm.bias.copy_(bias)
        self.spool.affine = norm  # what was spooled lacks them
        return moments.mapped(_keep_one(torch.cat([gain.diag(), bias[None]])))

    def note(self, moments: Moments) -> None:
        """Keep the projection of the layer just solved: least squares without a bias."""
        width = self.teacher.width
        bare = moments.mapped(torch.eye(self.student.width + 1, dtype=torch.float64)[:, :-1])
        projection = bare.ridge(self.placed(self.student.width), 1e-6, slice(width))
        self.projections.append(projection.float())
        self.errors.append(moments.error(F.pad(projection, (0, 0, 0, 1)), slice(width)))

    def embeddings(self) -> Moments:
        """Cut the embedding tables to the basis; moments with targets h_0 and the input of layer g(1)."""
        source: Any = self.teacher.base.embeddings
        target: Any = self.student.base.embeddings
        project, columns = self.teacher.project, self.basis
        if self.student.project is not None and project is not None:
            # ELECTRA's small tables stay as they are.
            columns = torch.arange(target.word_embeddings.embedding_dim)
            self.student.project.weight.copy_(project.weight[self.basis])
            self.student.project.bias.copy_(project.bias[self.basis])
            target.LayerNorm.load_state_dict(source.LayerNorm.state_dict())
        # Where the families differ, their first tokens' positions may lie in different rows.
        shifts = {"position_embeddings": self.teacher.first_position - self.student.first_position}
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            if not hasattr(target, name):
                continue
            rows = getattr(target, name).weight
            if not hasattr(source, name):  # no token types: none of them means anything
                rows.zero_()
                continue
            table = getattr(source, name).weight[shifts.get(name, 0) :]
            if project is not None and self.student.project is None:
                # Through the projection, as far as a layer norm in between lets it.
                table = (table - table.mean(1, keepdim=True)) * source.LayerNorm.weight @ project.weight.T
            rows.copy_(table[: len(rows), columns])
        if self.teacher.layers[0].position_bias is not None:
            mine: Any = self.student.base.encoder
            its: Any = self.teacher.base.encoder
            mine.relative_attention_bias.load_state_dict(its.relative_attention_bias.state_dict())
        norm = target.LayerNorm if self.student.project is None else None
        moments = self.settled(norm, self._embedded())
        self.note(moments)
        return moments

    def _embedded(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in self.raw():
            mask = _mask(batch)
            new = Spooled(mask, mask.float(), self.teacher.embed(batch), self.student.embed(batch))
            self.spool.put(new)
            goal = self.teach(new.teacher, mask, 0, self.layer_map[0] - 1)
            yield new.student[mask], torch.cat([new.teacher[mask], goal[mask]], 1), new.weights[mask]

    def attention(self, index: int, moments: Moments) -> None:
        """Solve Q, K, V and O of a layer from the moments of its input and that of the teacher's layer."""
        mine, its = self.student, self.teacher
        student, teacher = mine.layers[index], its.layers[self.layer_map[index] - 1]
        reach = _keep_one(self.regress(moments, slice(its.width, None)))
        through = [reach @ matrix(part) for part in (teacher.query, teacher.key, teacher.value)]
        solved = attention_factors(
            moments.gram / moments.gram[-1, -1],
            (through[0], through[1], through[2], matrix(teacher.out)[:, self.basis]),
            (its.heads, mine.heads),
            self.generator,
        )
        for linear, weights in zip(
            (student.query, student.key, student.value, student.out), solved, strict=True
        ):
            assign(linear, weights)

    def feed_forward(self, index: int) -> None:
        """Fit the first norm; choose the neurons among those of the teacher's layers of this step; solve."""
        first, last = self._group(index)
        student, width = self.student.layers[index], self.teacher.width
        layers = self.teacher.layers[first:last]
        moments = self.settled(student.norm1, self._attended(index))
        ups, downs = [], []
        for place, layer in enumerate(reversed(layers)):  # layer g(m) comes first in the targets
            reach = _keep_one(self.regress(moments, slice(place * width, (place + 1) * width)))
            ups.append(reach @ matrix(layer.up))
            downs.append(matrix(layer.down)[:-1, self.basis])
        up, down = torch.cat(ups, 1), torch.cat(downs)
        writes = down.abs().sum(1) > 0  # a pruned neuron may correlate with anything, and is nothing
        up, down = up[:, writes], down[writes]
        if up.shape[1] > _MOST_CANDIDATES:
            energy = sum(states.double().square().sum(0) for states, _, _ in self._neurons(index, up))
            loudest = (energy * down.square().sum(1)).topk(_MOST_CANDIDATES).indices.sort().values
            up, down = up[:, loudest], down[loudest]
        moments = Moments()
        for states, target, weights in self._neurons(index, up):
            moments.add(states, target, weights)
        kept = choose(moments, student.up.out_features)
        count, shape = len(kept), student.up.weight.T.shape
        prior = torch.cat([down[kept], matrix(layers[-1].down)[-1:, self.basis]])
        identity = torch.eye(len(moments.gram), dtype=torch.float64)
        solved = moments.mapped(identity[:, [*kept.tolist(), -1]]).ridge(prior, self.ridge)
        new_up = 0.02 * torch.randn(shape[0] + 1, shape[1], dtype=torch.float64, generator=self.generator)
        new_down = torch.zeros(shape[1] + 1, shape[0], dtype=torch.float64)
        new_up[:, :count], new_down[:count], new_down[-1] = up[:, kept], solved[:-1], solved[-1]
        assign(student.up, new_up)
        assign(student.down, new_down)

    def _group(self, index: int) -> tuple[int, int]:
        return (self.layer_map[index - 1] if index else 0), self.layer_map[index]

    def _attended(self, index: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        first, last = self._group(index)
        layer = self.student.layers[index]
        for batch in self.spool:
            states, goals = batch.teacher, batch.teacher
            middles: list[Tensor] = []
            for teacher in self.teacher.layers[first:last]:
                middles.insert(0, teacher.norm1(teacher.attend(states, batch.mask)))
                goals = teacher.feed(middles[0])
                states = teacher.norm2(goals)
            batch.teacher, batch.goal = states, goals[..., self.basis]
            batch.student = layer.norm1(layer.attend(batch.student, batch.mask))
            self.spool.put(batch)
            mask = batch.mask
            yield batch.student[mask], torch.cat(middles, -1)[mask], batch.weights[mask]

    def _neurons(self, index: int, up: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        layer = self.student.layers[index]
        weight, bias = up[:-1].T.float(), up[-1].float()
        for batch in self.spool:
            own, goal = batch.student[batch.mask], batch.goal[batch.mask]  # type: ignore[index]
            # The second norm divides by each token's spread: errors count as they will after it.
            weights = batch.weights[batch.mask] / goal.var(1).clamp_min(1e-6)
            yield layer.activation(F.linear(own, weight, bias)), goal - own, weights

    def finish(self, index: int) -> Moments:
        """Fit the second norm; moments of the layer's output with targets h_g(m) and what comes next."""
        norm = self.student.layers[index].norm2
        moments = self.settled(norm, self._fed(index))
        self.note(moments)
        return moments

    def _fed(self, index: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        last = self.layer_map[index]
        layer = self.student.layers[index]
        more = index + 1 < len(self.layer_map)
        goal_layer = self.layer_map[index + 1] - 1 if more else len(self.teacher.layers)
        for batch in self.spool:
            mask = batch.mask
            batch.student, batch.goal = layer.norm2(layer.feed(batch.student)), None
            self.spool.put(batch)
            goal = self.teach(batch.teacher, mask, last, goal_layer)
            yield batch.student[mask], torch.cat([batch.teacher[mask], goal[mask]], 1), batch.weights[mask]

    def _first_tokens(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the student's last states of first tokens (B, d') and the teacher's (B, d)."""
        for batch in self.spool:
            goal = self.teach(batch.teacher, batch.mask, self.layer_map[-1], len(self.teacher.layers))
            yield batch.student[:, 0], goal[:, 0]

    def solve(self) -> ClosedFormResult:
        """Solve everything, from the embeddings up."""
        self.keep_units()
        moments = self.embeddings()
        for index in range(len(self.layer_map)):
            self.attention(index, moments)
            self.feed_forward(index)
            moments = self.finish(index)
        reach = _keep_one(self.regress(moments, slice(self.teacher.width, None)))
        solve_head(self.teacher, self.student, reach, self.basis, self._first_tokens, ridge=self.ridge)
        return ClosedFormResult(self.projections, self.basis, self.errors)


def _mask(batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids).bool()


def check_solvable(teacher: PreTrainedModel, student: PreTrainedModel, layer_map: tuple[int, ...]) -> None:
    """Check that ``solve_student`` has a solution for two models.

    Raises:
        InputError: Families without a common form, a mapping that does not rise, a student larger than its
            teacher, or an MPNet student with fewer heads.
    """
    check_family(teacher, student)
    depth, teacher_depth = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    in_order = all(earlier < later for earlier, later in pairwise((0, *layer_map)))
    if len(layer_map) != depth or not in_order or layer_map[-1] > teacher_depth:
        raise InputError(
            f"the layer mapping {layer_map} does not lead {depth} student layers up through the teacher's "
            f"{teacher_depth}: a closed-form start needs each layer above the last"
        )
    for name in ("hidden_size", "num_attention_heads"):
        mine, its = getattr(student.config, name), getattr(teacher.config, name)
        if mine > its:
            raise InputError(
                f"the student's {name} is {mine}, more than the teacher's {its}: make it smaller"
            )
    heads = student.config.num_attention_heads, teacher.config.num_attention_heads
    if student.config.model_type == "mpnet" and heads[0] != heads[1]:
        raise InputError(
            f"the student has {heads[0]} heads and the teacher {heads[1]}: MPNet adds a position bias to the "
            "scores of each, so a closed-form start needs as many; leave --heads out, or start at random"
        )


@torch.no_grad()
def solve_student(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Batches,
    layer_map: tuple[int, ...],
    *,
    ridge: float = 1e-2,
    seed: int = 0,
) -> ClosedFormResult:
    """Set a student's weights to what its teacher computes, by linear algebra on unlabelled text.

    Exact where the student can be: with all layers, units and neurons it is the teacher. Fewer heads than the
    teacher's: those whose values vary most once written out are kept. Padding has no part in any fit.

    Args:
        teacher: BERT, (XLM-)RoBERTa, ELECTRA, DistilBERT or MPNet, bare or with a sequence, token or
            question-answering head (a masked-LM head is not solved); read only.
        student: The same class or, but for MPNet, BERT's like it, narrower and shallower; its weights are
            replaced. MPNet's position bias is copied, and needs as many heads.
        batches: Tokenised text: a list, or a function that gives a fresh iterator. Memory does not grow with
            it; meanwhile 4 to 6 KB a token (from 384 or 768 units to 312) wait in the temporary folder.
        layer_map: g(1) < ... < g(M), the teacher layer (from 1) that each student layer stands for.
        ridge: Strength of the shrinkage towards the teacher's own weights, relative to the mean square.
        seed: Of the weights that nothing determines (neurons and head dimensions to spare).

    Raises:
        InputError: See ``check_solvable``; or there is no text.
    """
    check_solvable(teacher, student, layer_map)
    modes = [(model, model.training) for model in (teacher, student)]
    try:
        for model, _ in modes:
            model.eval()
        with TemporaryDirectory(prefix="tinybert-") as folder:
            return _Solver(teacher, student, batches, tuple(layer_map), ridge, seed, folder).solve()
    finally:
        for model, training in modes:
            model.train(training)
