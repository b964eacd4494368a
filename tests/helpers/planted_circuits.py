"""Models whose circuit is known, because their weights are set by hand.

Each is a Llama of four query heads that share two key/value heads, with norms and rotated
positions. Its docstring says how it works, and from that derives what each edge of its circuit is
worth; every other edge is worth 0, up to 1e-4. Values are normalised: 0 is the target run, 1 the
source run. An edge `u->v` is worth what the metric (logit of the source answer minus that of the
target answer, at the last token) moves if v alone reads what u would have written in the source
run.

Beside the circuit each model has nodes that are `idle` (they write nothing), `alike` (they write,
and the answer's logits read it, but the same in both runs), and `stray` (they write different
things in the two runs, where nobody reads, or what others read of it goes nowhere).
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from torch import Tensor
from transformers import LlamaForCausalLM

from tests.helpers.planted_wiring import SHARP, Wiring

#: How many names there are, and other things that come in as many kinds.
KINDS = 4
NAMES = tuple(f"name{each}" for each in range(KINDS))
#: The logit that an answer gets from a signal of 1.
LOUD = 10.0
#: What a token that is no part of the circuit adds to a logit in both runs.
ALIKE = {"alike": 3.0}


@attrs.frozen(eq=False)
class Planted:
    """A model, the two runs that tell its circuit, and the circuit."""

    model: LlamaForCausalLM
    #: `[batch, seq]`, without padding.
    source_tokens: Tensor
    target_tokens: Tensor
    #: `[batch]`.
    source_answer_index: Tensor
    target_answer_index: Tensor
    #: Those worth more than `threshold` either way.
    edges: frozenset[str]
    describe: str
    #: What each of the edges is worth, by the derivation.
    values: Mapping[str, float]
    #: Between what the edges of the circuit are worth, and the 1e-4 of all others.
    threshold: float
    #: Senders that write nothing, the same in both runs, or in vain.
    idle: frozenset[str]
    alike: frozenset[str]
    stray: frozenset[str]


def chain() -> Planted:
    """A circuit of six steps: by values, keys, an MLP, queries, values, and two heads at once.

    A prompt is `bos F name_i G name_j key_i+1 key_j+1 last`. In the other run F and G have changed
    places. The model finds the name after F, counts it up by one, finds that key, and answers the
    payload that belongs to it.

    | edge | what goes along it |
    | --- | --- |
    | `input->a0.h0<v>` | F or G, which head 0 of layer 0 moves one token on, to a name |
    | `a0.h0->a1.h0<k>` | so the last token finds the name after F, and takes it |
    | `a1.h0->m1` | the name, which the MLP counts up, by units that only tell if it is there |
    | `m1->a2.h1<q>` | so the last token looks for another key, and takes its payload |
    | `a2.h1->a3.h1<v>` | the payload, which two heads that share a value read |
    | `a3.h2->logits`, `a3.h3->logits` | and of which each writes one half |

    Each step up to the last hands on all that differs between the runs, and no other does: it is
    worth 1. Of the two heads each moves the logit difference half of the way: 1/2.

    In vain: head 2 of layer 1 takes the same name as the circuit, into a part that nobody reads,
    and the MLP of layer 2 reads the payload into it. What the former's key reads is an edge in
    which something happens, and nothing comes of it.
    """
    kinds = range(KINDS)
    wiring = Wiring(
        layers=4,
        tokens=(
            *("bos", "last", "F", "G"),
            *NAMES,
            *(f"key{each}" for each in kinds),
            *(f"answer{each}" for each in kinds),
        ),
        parts={
            **{"flag": 2, "name": KINDS, "key": KINDS, "payload": KINDS},
            **{"marked": 2, "found": KINDS, "counted": KINDS, "drawn": KINDS, "answer": KINDS},
            **{"alike": 1, "stray": KINDS},
        },
    )
    wiring.embed("F", "flag.0")
    wiring.embed("G", "flag.1")
    for each in kinds:
        wiring.embed(f"name{each}", f"name.{each}")
        wiring.embed(f"key{each}", f"key.{each}", f"payload.{(each + 2) % KINDS}")
        wiring.unembed(f"answer{each}", {f"answer.{each}": LOUD, **(ALIKE if not each else {})})

    wiring.values(0, 0, "flag")
    wiring.looks_back(0, 0)
    wiring.writes(0, 0, "flag", "marked")
    wiring.keys(0, 1, "bos")
    wiring.values(0, 1, "bos")
    wiring.alike(0, 2)

    wiring.keys(1, 0, "bos", "marked.0")
    wiring.values(1, 0, "name", "bos")
    wiring.finds(1, 0, "last", "marked.0")
    wiring.writes(1, 0, "name", "found")
    wiring.alike(1, 1)
    wiring.keys(1, 1, "bos", "marked.0")
    wiring.values(1, 1, "name")
    wiring.finds(1, 2, "last", "marked.0")
    wiring.writes(1, 2, "name", "stray")
    for each in kinds:
        # 0 below a quarter, 1 above three quarters.
        for edge, slope in ((0.25, 2), (0.75, -2)):
            out = {f"counted.{(each + 1) % KINDS}": float(slope)}
            wiring.unit(1, {f"found.{each}": 1, "one": -edge}, out)

    wiring.keys(2, 0, "bos", "key")
    wiring.values(2, 0, "payload")
    wiring.finds(2, 1, "counted", "key")
    wiring.writes(2, 1, "payload", "drawn")
    wiring.copies(2, "drawn", "stray")

    wiring.keys(3, 0, "bos")
    wiring.values(3, 0, "bos")
    wiring.alike(3, 1)
    wiring.keys(3, 1, "bos", "last")
    wiring.values(3, 1, "drawn")
    for head in (2, 3):
        wiring.finds(3, head, "last", "last")
        wiring.writes(3, head, "drawn", "answer", 0.5)
    wiring.alike(3, None)

    # The two names of each prompt, and if F comes first in the source run.
    drawn = ((0, 1, True), (2, 0, False), (3, 2, True), (1, 3, False))
    source, target, answers = [], [], []
    for first, second, ahead in drawn:
        runs = []
        for marks in (("F", "G"), ("G", "F")):
            ends = (f"key{(first + 1) % KINDS}", f"key{(second + 1) % KINDS}")
            runs.append((marks[0], f"name{first}", marks[1], f"name{second}", *ends))
        right = [f"answer{(each + 3) % KINDS}" for each in (first, second)]
        source.append(runs[0 if ahead else 1])
        target.append(runs[1 if ahead else 0])
        answers.append(right if ahead else right[::-1])
    return _planted(
        wiring,
        (source, target, answers),
        values={
            "input->a0.h0<v>": 1,
            "a0.h0->a1.h0<k>": 1,
            "a1.h0->m1": 1,
            "m1->a2.h1<q>": 1,
            "a2.h1->a3.h1<v>": 1,
            "a3.h2->logits": 0.5,
            "a3.h3->logits": 0.5,
        },
        threshold=0.25,
        idle="a0.h1 a0.h3 m0 a1.h3 a2.h0 a2.h2 a2.h3 a3.h0",
        alike="a0.h2 a1.h1 a3.h1 m3",
        stray="a1.h2 m2",
        describe="one chain, by values, keys, an MLP, queries, values, and two heads at once",
    )


def redundant(leak: float = 0.05, *, restored: bool = False) -> Planted:
    """Two paths, each of which suffices: an OR.

    A prompt is `bos filler on filler last`, with `off` in the source run. Two heads of layer 0 that
    share nothing tell the last token that it is on: one tells the MLP of layer 1, the other the MLP
    of layer 0, which passes it on to that of layer 1. That one answers "yes" if either did. With s
    of them it writes

        or(0) = 0, or(1) = 1 - leak, or(s) = 1 from s = 1.25 on, straight between these.

    So an edge of one path alone is worth or(2) - or(1) = leak, both paths together are worth 1, and
    so is the edge `m1->logits` after they have met. At s = 2, in the target run, or is flat: its
    slope tells nothing of the paths, even where `leak` is large.

    With `leak=0` an edge of one path is worth nothing exactly, and the circuit by exact edges, each
    alone, is what comes after the OR. With `restored=True` the two runs change places: the source
    run is on, each path restores or(1) - or(0) = 1 - leak alone, and nothing is hidden.

    In vain: head 3 of layer 0 tells that it is off.
    """
    wiring = Wiring(
        layers=2,
        tokens=("bos", "last", "on", "off", "filler0", "filler1", "filler2", "yes", "no"),
        parts={
            **{"signal": 1, "on": 1, "off": 1, "first": 1, "second": 1, "passed": 1},
            **{"yes": 1, "alike": 1, "stray": 1},
        },
    )
    wiring.embed("on", "signal", "on")
    wiring.embed("off", "signal", "off")
    wiring.unembed("yes", {"yes": LOUD})
    wiring.unembed("no", {"one": LOUD / 2, **ALIKE})

    wiring.keys(0, 0, "bos", "signal")
    wiring.values(0, 0, "on", "bos")
    wiring.finds(0, 0, "last", "signal")
    wiring.writes(0, 0, "on", "first")
    wiring.alike(0, 1)
    wiring.keys(0, 1, "bos", "signal")
    wiring.values(0, 1, "on", "off")
    for head, value, part in ((2, "on", "second"), (3, "off", "stray")):
        wiring.finds(0, head, "last", "signal")
        wiring.writes(0, head, value, part)
    wiring.copies(0, "second", "passed")

    # From corner to corner of `or`, by how much it bends. The first corner lies below 0, so that
    # the source run stands on a slope and not on a corner.
    slopes = ((-0.5, 1 - leak), (1.0, 5 * leak - 1), (1.25, -4 * leak))
    for corner, bend in slopes:
        wiring.unit(1, {"first": 1, "passed": 1, "one": -corner}, {"yes": bend})
    wiring.unit(1, {"one": 1}, {"yes": -0.5 * (1 - leak)})
    wiring.keys(1, 0, "bos")
    wiring.values(1, 0, "bos")
    wiring.alike(1, 1)

    fillers = ((0, 1), (2, 2), (1, 0))
    states, answers = ("off", "on"), ("no", "yes")
    if restored:
        states, answers = states[::-1], answers[::-1]
    source, target = (
        [(f"filler{first}", state, f"filler{second}") for first, second in fillers]
        for state in states
    )
    alone = 1 - leak if restored else leak
    paths = (
        *("input->a0.h0<v>", "a0.h0->m1"),
        *("input->a0.h1<v>", "a0.h2->m0", "m0->m1"),
    )
    return _planted(
        wiring,
        (source, target, [answers] * len(fillers)),
        values={**(dict.fromkeys(paths, alone) if alone else {}), "m1->logits": 1},
        threshold=alone / 5 or 0.1,
        idle="a1.h0 a1.h2 a1.h3",
        alike="a0.h1 a1.h1",
        stray="a0.h3",
        describe=f"two paths into an OR: one alone is worth {alone:g}, both together 1",
    )


def backup(strength: float = 0.6, *, spared: bool = False) -> Planted:
    """A backup head, which acts only if the main head does not.

    A prompt is `bos name_i cue_on last`, with `cue_off` in the source run. Head 0 of layer 0 moves
    the cue to the last token. The main head (head 2 of layer 1) takes the name if the cue is on,
    and writes it with strength 1. The backup head (head 1 of layer 2) takes the name unless the
    main head has written one, and writes it with `strength` b. Only the name's logit (10 for a
    strength of 1) is moved: the target run has 1 in it, the source run b. In units of their
    difference, b - 1:

    | edge | the name's strength then | worth |
    | --- | --- | --- |
    | `input->a0.h0<v>`, `a0.h0->a1.h2<q>` | b: main head off, backup head on | 1 |
    | `a1.h2->logits` | 0: the backup head does not know | -1 / (b - 1) = 1 / (1 - b) |
    | `a1.h2->a2.h1<q>` | 1 + b: both write | b / (b - 1) = -b / (1 - b) |
    | `a2.h1->logits` | 1 + b | -b / (1 - b) |

    The main head's own edge is worth more than the whole effect, and the backup head's is negative:
    it works against the change. 5/2 and -3/2 with the default.

    With `spared=True` the cue is on in both runs, and the names differ. Then the backup head does
    nothing in either: the circuit is `input->a1.h1<v>` and `a1.h2->logits`, each worth 1, and a
    backup head is what no single edge can show.

    In vain: head 3 of layer 1 takes the name if the cue is off, and the MLP of layer 2 reads what
    the main head writes.
    """
    wiring = Wiring(
        layers=3,
        tokens=("bos", "last", "cue_on", "cue_off", *NAMES),
        parts={
            **{"cue": 1, "state": 2, "named": 1, "name": KINDS},
            **{"heard": 2, "said": KINDS, "again": KINDS, "alike": 1, "stray": KINDS},
        },
    )
    wiring.embed("cue_on", "cue", "state.0")
    wiring.embed("cue_off", "cue", "state.1")
    for each, name in enumerate(NAMES):
        wiring.embed(name, "named", f"name.{each}")
        loud = {f"said.{each}": LOUD, f"again.{each}": LOUD}
        wiring.unembed(name, {**loud, **(ALIKE if not each else {})})

    wiring.keys(0, 0, "bos", "cue")
    wiring.values(0, 0, "state")
    wiring.finds(0, 0, "last", "cue")
    wiring.writes(0, 0, "state", "heard")
    wiring.keys(0, 1, "bos")
    wiring.values(0, 1, "bos")
    wiring.alike(0, 2)
    wiring.alike(0, None)

    wiring.keys(1, 1, "bos", "named")
    wiring.values(1, 1, "name")
    for head, heard, part in ((2, "heard.0", "said"), (3, "heard.1", "stray")):
        wiring.finds(1, head, heard, "named")
        wiring.writes(1, head, "name", part)

    wiring.keys(2, 0, "bos", "named")
    wiring.values(2, 0, "name", "bos")
    wiring.alike(2, 0)
    wiring.finds(2, 1, "last", "named")
    wiring.looks(2, 1, "said", "named", -2 * SHARP)
    wiring.writes(2, 1, "name", "again", strength)
    wiring.copies(2, "said", "stray")

    if spared:
        pairs = ((0, 1), (2, 0), (3, 2), (1, 3))
        source, target = ([(NAMES[pair[run]], "cue_on") for pair in pairs] for run in (0, 1))
        answers = [(NAMES[one], NAMES[other]) for one, other in pairs]
        values = {"input->a1.h1<v>": 1.0, "a1.h2->logits": 1.0}
    else:
        source, target = ([(name, cue) for name in NAMES] for cue in ("cue_off", "cue_on"))
        answers = [(NAMES[each - 1], NAMES[each]) for each in range(KINDS)]
        whole = strength - 1
        values = {
            "input->a0.h0<v>": 1,
            "a0.h0->a1.h2<q>": 1,
            "a1.h2->logits": -1 / whole,
            "a1.h2->a2.h1<q>": strength / whole,
            "a2.h1->logits": strength / whole,
        }
    return _planted(
        wiring,
        (source, target, answers),
        values=values,
        threshold=0.5,
        idle="a0.h1 a0.h3 a1.h0 a1.h1 m1 a2.h2 a2.h3",
        alike="a0.h2 m0 a2.h0",
        stray="m2" if spared else "a1.h3 m2",
        describe=(
            "a backup head that is spared in both runs"
            if spared
            else f"a backup head of strength {strength:g} where the main head fails"
        ),
    )


def negative(strength: float = 0.4) -> Planted:
    """A negative head: it finds what has been said in the prompt, and writes against it.

    A prompt is `bos name_i last`, with another name in the source run. The main head (head 0 of
    layer 1) takes the name, and says it with strength 1. The negative head (head 3 of layer 2)
    looks for what was said, takes the name that it finds there, and writes it with -`strength`, -n.
    Write S and T for what is said of the source name and of the target name, so the metric is
    10 (S - T): the target run has (S, T) = (0, 1 - n), the source run (1 - n, 0), and the whole
    is 2 (1 - n).

    | edge | (S, T) then | worth, times 2 (1 - n) |
    | --- | --- | --- |
    | `input->a1.h0<v>` | (1, 0): what is said now stands nowhere | 2 - n |
    | `a1.h0->logits` | (1, -n) | 2 |
    | `a1.h0->a2.h3<q>` | (0, 1): as above, the negative head finds nothing | -n |
    | `input->a2.h1<k>` | (0, 1) | -n |
    | `input->a2.h1<v>` | (-n, 1): it writes against the wrong name | -2 n |
    | `a2.h3->logits` | (-n, 1) | -2 n |

    So 4/3, 5/3, -1/3, -1/3, -2/3, -2/3 with the default. Whatever belongs to the negative head
    alone is negative.

    In vain: the MLP of layer 0 and head 2 of layer 1 read the name.
    """
    wiring = Wiring(
        layers=3,
        tokens=("bos", "last", *NAMES),
        parts={"named": 1, "name": KINDS, "said": KINDS, "alike": 1, "stray": KINDS},
    )
    for each, name in enumerate(NAMES):
        wiring.embed(name, "named", f"name.{each}")
        wiring.unembed(name, {f"said.{each}": LOUD, **(ALIKE if not each else {})})

    wiring.keys(0, 0, "bos")
    wiring.values(0, 0, "bos")
    wiring.alike(0, 0)
    wiring.copies(0, "name", "stray")

    for group, head, part in ((0, 0, "said"), (1, 2, "stray")):
        wiring.keys(1, group, "bos", "named")
        wiring.values(1, group, "name")
        wiring.finds(1, head, "last", "named")
        wiring.writes(1, head, "name", part)

    wiring.keys(2, 1, "bos", "name")
    wiring.values(2, 1, "name")
    wiring.finds(2, 3, "said", "name")
    wiring.writes(2, 3, "name", "said", -strength)
    wiring.alike(2, None)

    pairs = ((0, 1), (2, 0), (3, 2), (1, 3))
    source, target = ([(NAMES[pair[run]],) for pair in pairs] for run in (0, 1))
    whole = 2 * (1 - strength)
    return _planted(
        wiring,
        (source, target, [(NAMES[one], NAMES[other]) for one, other in pairs]),
        values={
            "input->a1.h0<v>": (2 - strength) / whole,
            "a1.h0->logits": 2 / whole,
            "a1.h0->a2.h3<q>": -strength / whole,
            "input->a2.h1<k>": -strength / whole,
            "input->a2.h1<v>": -2 * strength / whole,
            "a2.h3->logits": -2 * strength / whole,
        },
        threshold=strength / whole / 2,
        idle="a0.h1 a0.h2 a0.h3 a1.h1 a1.h3 m1 a2.h0 a2.h1 a2.h2",
        alike="a0.h0 m2",
        stray="m0 a1.h2",
        describe=f"a negative head, which writes -{strength:g} times what the main head says",
    )


#: The models of the table that says what each method finds.
PLANTED = {
    "chain": chain,
    "redundant": redundant,
    "redundant, no leak": lambda: redundant(0.0),
    "redundant, restored": lambda: redundant(restored=True),
    "backup": backup,
    "backup, spared": lambda: backup(spared=True),
    "negative": negative,
}


def _planted(
    wiring: Wiring,
    runs: tuple[list, list, list],
    *,
    values: Mapping[str, float],
    threshold: float,
    idle: str,
    alike: str,
    stray: str,
    describe: str,
) -> Planted:
    """Of the prompts of the two runs, and the source and the target answer of each pair."""
    source, target, answers = runs
    right, wrong = wiring.answers(answers)
    return Planted(
        model=wiring.model.requires_grad_(),
        source_tokens=wiring.prompts(*source),
        target_tokens=wiring.prompts(*target),
        source_answer_index=right,
        target_answer_index=wrong,
        edges=frozenset(values),
        describe=describe,
        values=values,
        threshold=threshold,
        idle=frozenset(idle.split()),
        alike=frozenset(alike.split()),
        stray=frozenset(stray.split()),
    )
