"""A loaded bundle: text in, text out.

::

    model = load("smollm2/")
    for token in model.stream("Why is the sky blue?"):
        print(token.text, end="")
    result = model.generate("Why is the sky blue?", max_new_tokens=64, strategy="self-speculative")
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Literal, get_args

from shortstack.graphs.bundle import Bundle, open_bundle
from shortstack.graphs.errors import RequestError
from shortstack.runtime.decode.choice import Choice, make_choice
from shortstack.runtime.decode.draft_length import DraftLength, DraftPolicy
from shortstack.runtime.decode.plain import plain
from shortstack.runtime.decode.sampling import SamplingParams
from shortstack.runtime.decode.sequence import TokenSequence
from shortstack.runtime.decode.speculative import speculative
from shortstack.runtime.decode.step import Stats, Step
from shortstack.runtime.decode.stream import FinishReason, Stream
from shortstack.runtime.early_exit.adaptive import Adaptive, AdaptiveThreshold
from shortstack.runtime.early_exit.auto import AutoCatchUp, WayCosts
from shortstack.runtime.early_exit.catch_up import CatchUp, FlushCatchUp
from shortstack.runtime.early_exit.loop import EarlyExit, Observer
from shortstack.runtime.early_exit.pending import PendingCap
from shortstack.runtime.early_exit.pipeline import PipelineCatchUp
from shortstack.runtime.early_exit.policy import ExitPolicy
from shortstack.runtime.engine.open_graphs import open_graphs
from shortstack.runtime.engine.passes import PrefillPasses, check_passes
from shortstack.runtime.engine.session import Placement
from shortstack.runtime.engine.stack import Stack
from shortstack.runtime.engine.whole_text import Activations, Array, run_text
from shortstack.runtime.text.stop import StopStrings
from shortstack.runtime.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
Strategy = Literal["plain", "self-speculative", "early-exit"]


@dataclass(frozen=True, slots=True)
class Result:
    """One finished generation.

    Attributes:
        text: What was generated, without the prompt, special tokens and stop string.
        tokens: The generated token ids, the stopping one included.
        finish_reason: Why it ended.
        stats: What it took.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


def load(
    path: str | Path,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    upper: Placement | None = None,
    prefill_passes: PrefillPasses = "converged",
    verify_hashes: bool = False,
) -> Model:
    """Load a bundle.

    Args:
        path: The bundle's folder.
        providers: Execution providers in order of preference: ``cpu``, ``cuda``, or onnxruntime's names. None: CPU.
        threads: Threads of the process's one pool. None: all usable cores.
        upper: Where all segments but the lowest compute, for early exit as a pipeline. None: where the lowest does.
        prefill_passes: How often a prompt runs through layers that use keys and values of layers above them: so many
            times, until it has ``converged``, or ``sequential``: position by position.
        verify_hashes: Check every file's sha256 first.

    Raises:
        BundleError: The folder is not a sound bundle.
        ContractError: A graph is not what bundle.json says.
        RequestError: An unknown provider, or passes that are none.
    """
    bundle = open_bundle(path, verify_hashes=verify_hashes)
    return Model(bundle, providers=providers, threads=threads, upper=upper, prefill_passes=prefill_passes)


class Model:
    """A bundle with its sessions, its cache and its tokenizer. One generation at a time.

    Args:
        bundle: The bundle.
        providers: See :func:`load`.
        threads: See :func:`load`.
        upper: See :func:`load`.
        prefill_passes: See :func:`load`.

    Attributes:
        bundle: The bundle.
        tokenizer: Its tokenizer.
        cache: Its KV buffers.
        graphs: Its graphs, open.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        upper: Placement | None = None,
        prefill_passes: PrefillPasses = "converged",
    ) -> None:
        self.bundle = bundle
        self._prefill_passes = check_passes(prefill_passes)
        with ThreadPoolExecutor(1) as pool:  # onnxruntime packs weights meanwhile
            tokenizer = pool.submit(Tokenizer.load, bundle.folder)
            self.graphs = open_graphs(bundle, providers, threads, upper)
            self.tokenizer = tokenizer.result()
        self.cache = self.graphs.new_cache(bundle.manifest.max_length)
        self._stacks: dict[tuple[int, ...], Stack] = {}
        # What was learned about costs and acceptance outlives a generation, so that the next one starts with it.
        self._lengths: dict[tuple[int, DraftPolicy], DraftLength] = {}
        self._caps: dict[tuple[int | None, tuple[int, ...]], PendingCap] = {}
        self._ways: dict[tuple[int, ...], WayCosts] = {}
        self._thresholds: dict[tuple[tuple[int, ...], Adaptive], AdaptiveThreshold] = {}
        self._sequence = TokenSequence()
        self._stream: Stream | None = None

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The depths that can draft."""
        return self.bundle.manifest.plan.boundaries

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        strategy: Strategy = "plain",
        exit_layer: int | None = None,
        draft: DraftPolicy | None = None,
        exits: ExitPolicy | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        reuse_cache: bool = False,
    ) -> Stream:
        """Start generating.

        Args:
            prompt: Chat messages (``[{"role": "user", "content": ...}]``) go through the bundle's chat template, a
                string goes in as it is, token ids go in untouched.
            max_new_tokens: Tokens to generate at most.
            strategy: ``plain``; ``self-speculative``: the same output, drafted by an exit; or ``early-exit``: a token
                leaves at the first exit that is sure of it, as ``exits`` says.
            exit_layer: Which exit drafts; None takes the lowest.
            draft: How many tokens to draft; None drafts adaptively, four at most, but always four where ``sampling``
                has a seed: what is drafted decides how draws are used, and adaptive lengths follow the clock.
            exits: When tokens leave early; needed by ``early-exit``, and for it alone.
            sampling: Temperature and the rest; None is greedy.
            stop: Strings that end the text; they are not part of it.
            ignore_eos: Go on after an end-of-sequence token.
            reuse_cache: Keep the cache of the longest common beginning with the generation before (multi-turn chat).

        Returns:
            An iterator over :class:`~shortstack.runtime.decode.stream.Token`; closing it early leaves the model usable.

        Raises:
            RequestError: An empty or too long prompt, an unknown strategy or exit, an exit policy that this bundle
                cannot follow.
        """
        ids = self.encode(prompt)
        used = self._exits_used(strategy, exit_layer, exits)
        if max_new_tokens < 1:
            raise RequestError("max_new_tokens", found=max_new_tokens, expected="1 or more")
        sampling = sampling or SamplingParams()
        stop_strings = StopStrings(stop)
        if exits is not None and exits.verify == "rollback" and not sampling.is_greedy:
            raise RequestError(
                "verify rollback is a rule for greedy decoding",
                found=f"temperature {sampling.temperature}",
                remedy="set the temperature to 0, or verify exact",
            )
        stack = self._stack(used)
        # Every check is behind us: from here on the generation before is over.
        if self._stream is not None:
            self._stream.supersede()
        if not reuse_cache:
            self._sequence.rewind(0)
        stats = Stats(prompt=len(ids), reused=self._sequence.restart(ids))
        limit = min(max_new_tokens, self.cache.max_length - len(ids))
        choice = make_choice(sampling)
        if exits is not None:
            steps = self._early_exit(stack, choice, stats, limit, exits, is_repeatable=sampling.is_repeatable)
        elif not used:
            steps = plain(stack, self._sequence, choice, stats, limit)
        else:
            policy = draft or DraftPolicy(is_adaptive=not sampling.is_repeatable)
            length = self._lengths.setdefault((used[0], policy), DraftLength(policy))
            steps = speculative(stack, self._sequence, choice, stats, limit, length)
        self._stream = Stream(
            steps,
            stats,
            self.tokenizer,
            eos_ids=() if ignore_eos else self.tokenizer.eos_token_ids,
            stop=stop_strings,
            limit=limit,
            limit_reason="length" if limit == max_new_tokens else "context",
        )
        return self._stream

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        strategy: Strategy = "plain",
        exit_layer: int | None = None,
        draft: DraftPolicy | None = None,
        exits: ExitPolicy | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        reuse_cache: bool = False,
    ) -> Result:
        """Generate to the end; see :meth:`stream` for the arguments and errors."""
        stream = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            strategy=strategy,
            exit_layer=exit_layer,
            draft=draft,
            exits=exits,
            sampling=sampling,
            stop=stop,
            ignore_eos=ignore_eos,
            reuse_cache=reuse_cache,
        )
        for _ in stream:
            pass
        assert stream.finish_reason is not None
        return Result(stream.text, tuple(stream.token_ids), stream.finish_reason, stream.stats)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return a prompt's token ids, checked against vocabulary and context.

        Raises:
            RequestError: The prompt is empty, too long, or holds an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        else:
            messages = [item for item in prompt if isinstance(item, Mapping)]
            others = [item for item in prompt if not isinstance(item, Mapping)]
            if messages and others:
                raise RequestError("the prompt mixes chat messages and token ids", remedy="give one or the other")
            for item in others:
                if not isinstance(item, Integral) or isinstance(item, bool):
                    raise RequestError("the prompt holds something else than token ids", found=repr(item))
            ids = [int(item) for item in others]
            if messages:
                ids = self.tokenizer.encode_chat(messages)
        if not ids:
            raise RequestError("the prompt is empty", remedy="give at least one token")
        vocab_size = self.bundle.manifest.spec.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise RequestError(
                "the prompt holds a token id outside the vocabulary",
                found=max(ids) if max(ids) >= vocab_size else min(ids),
                expected=f"0..{vocab_size - 1}",
            )
        if len(ids) >= self.cache.max_length:
            raise RequestError(
                "the prompt is too long for this bundle",
                found=f"{len(ids)} tokens",
                expected=f"fewer than {self.cache.max_length}, so that one more fits",
                remedy="shorten the prompt, or export with a larger --max-length",
            )
        return ids

    def exclusive_stack(self, exit_layers: int | Sequence[int] | None = None) -> Stack:
        """Return a stack for direct use; the generation before is over and its cache forgotten.

        Args:
            exit_layers: Which exits it uses; None is the uncut stack.
        """
        if self._stream is not None:
            self._stream.supersede()
        self._sequence.rewind(0)
        wanted = () if exit_layers is None else (exit_layers,) if isinstance(exit_layers, int) else exit_layers
        return self._stack(tuple(wanted))

    def activations(self, tokens: Sequence[int], states: Array | None = None) -> Activations:
        """Return what the model computes for one text: logits of every head, hidden states, keys and values.

        The text runs through buffers of its own, so a generation is not disturbed.

        Args:
            tokens: The text.
            states: See :func:`~shortstack.runtime.engine.whole_text.run_text`.
        """
        return run_text(self.graphs, tokens, states)

    def _early_exit(
        self,
        stack: Stack,
        choice: Choice,
        stats: Stats,
        limit: int,
        policy: ExitPolicy,
        *,
        is_repeatable: bool,
    ) -> Iterator[Step]:
        """Start the loop of early exit; what was learned about costs and thresholds is shared by all generations."""
        used = stack.depths[:-1]
        observe: Observer | None = None
        if isinstance(wanted := policy.criterion, Adaptive):
            learned = self._thresholds.setdefault((used, wanted), AdaptiveThreshold(wanted, used))
            policy, observe = replace(policy, criterion=learned.begin()), learned.observe
        # Where verification draws at random, what is drafted must not follow the clock.
        fixed = policy.max_pending or (stack.window if is_repeatable else None)
        cap = self._caps.setdefault((fixed, used), PendingCap(stack.window, fixed))

        def flush() -> CatchUp:
            return FlushCatchUp(
                stack,
                stats,
                cap,
                recomputes=policy.kv_policy == "recompute",
                fills_all=policy.verify != "none" or observe is not None,
            )

        def pipeline() -> CatchUp:
            return PipelineCatchUp(stack, stats)

        catch_up: CatchUp
        if stack.filling_levels == 1:  # nothing is ever pending: there is nothing to pipeline
            catch_up = flush()
        elif policy.kv_policy == "auto":
            catch_up = AutoCatchUp({"flush": flush, "pipeline": pipeline}, self._ways.setdefault(used, WayCosts()))
        else:
            catch_up = pipeline() if policy.kv_policy == "pipeline" else flush()
        return EarlyExit(stack, self._sequence, choice, stats, limit, policy, catch_up, cap, observe).steps()

    def _exits_used(self, strategy: Strategy, exit_layer: int | None, policy: ExitPolicy | None) -> tuple[int, ...]:
        """Return the exits that a strategy uses, none for plain decoding, if the bundle has what is asked for."""
        exits = self.exit_layers
        if strategy not in get_args(Strategy):
            expected = " or ".join(repr(name) for name in get_args(Strategy))
            raise RequestError("strategy", found=repr(strategy), expected=expected)
        if (policy is not None) != (strategy == "early-exit"):
            raise RequestError(
                f"strategy {strategy!r}: exits",
                found="an exit policy" if policy is not None else "no exit policy",
                expected="an ExitPolicy with the strategy 'early-exit', and with no other",
            )
        if policy is not None:
            if exit_layer is not None:
                raise RequestError(
                    "exit_layer names the exit that drafts", remedy="set ExitPolicy.exit_layers for early exit"
                )
            return policy.exits_in(self.bundle.manifest.plan)
        if exit_layer is not None and exit_layer not in exits:
            raise RequestError(
                "exit_layer is not an exit of this bundle",
                found=exit_layer,
                expected=f"one of {list(exits)}" if exits else "an exit, and this bundle has none",
                remedy=f"re-export with --exit-layer {exit_layer}",
            )
        if strategy == "self-speculative" and not exits:
            raise RequestError(
                "self-speculation needs an exit, and this bundle has none",
                remedy="re-export with --exit-layer E, or use the plain strategy",
            )
        return () if strategy == "plain" else (exit_layer or exits[0],)

    def _stack(self, used: tuple[int, ...]) -> Stack:
        """Return the stack that uses these exits, made once: it holds the prebuilt bindings."""
        if used not in self._stacks:
            self._stacks[used] = Stack(self.graphs, self.cache, used, self._prefill_passes)
        return self._stacks[used]
