"""EleutherAI's lm-evaluation-harness on our models: its official tasks, our forward.

The `harness` extra. `AssayLM` is what the harness calls a model: log-likelihoods of continuations
(contexts shared by several are computed once), of whole texts in windows, and greedy texts.
"""

import os
from collections.abc import Sequence
from typing import Any

from assay.data.tokenizers import Tokenizer
from assay.errors import AssayError, did_you_mean, need_extra
from assay.evaluate.likelihood import loglikelihoods
from assay.generate.text import complete_batch
from assay.model.transformer import Transformer


def harness_model(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    stop_tokens: Sequence[int] = (),
) -> Any:
    """The model as lm-evaluation-harness' `LM`. `stop_tokens` end a text, beside the tokenizer's
    own end.

    Raises:
        AssayError: if the harness is not installed, or the tokenizer has no token that starts a
            document.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError:
        raise need_extra("lm_eval", "harness", "--harness") from None
    if tokenizer.bos_id is None:
        raise AssayError("--harness: the tokenizer has no token that starts a document.")

    class AssayLM(TemplateLM):
        """Requests in, answers out, in the order that they came."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            begins = () if add_special_tokens is False else tokenizer.prefix_ids
            return [*begins, *map(int, tokenizer.encode(string))]

        def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = loglikelihoods(model, pairs, batch_size=batch_size)
            return [(one.nats, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            pairs, of = [], []
            for number, request in enumerate(requests):
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=model.spec.context,
                    context_len=1,
                )
                pairs += [make_disjoint_window(window) for window in windows]
                of += [number] * (len(pairs) - len(of))
            totals = [0.0] * len(requests)
            for number, one in zip(
                of, loglikelihoods(model, pairs, batch_size=batch_size), strict=True
            ):
                totals[number] += one.nats
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            texts = [""] * len(requests)
            alike: dict[tuple[str, ...], list[tuple[int, list[int], int]]] = {}
            for number, request in enumerate(requests):
                prompt, settings = request.args
                settings = normalize_gen_kwargs(settings)  # as its own backends read them
                if settings["do_sample"]:
                    raise AssayError(
                        "--harness: a task asks for sampled text; only greedy text is made."
                    )
                new = settings["max_gen_toks"]
                row = (number, self._shortened(prompt, new), new)
                alike.setdefault(tuple(settings["until"]), []).append(row)
            for stop, rows in alike.items():
                rows.sort(key=lambda row: len(row[1]), reverse=True)  # alike in length, too
                for start in range(0, len(rows), batch_size):
                    numbers, prompts, new = zip(*rows[start : start + batch_size], strict=True)
                    done = complete_batch(
                        model,
                        tokenizer,
                        prompts,
                        max_new_tokens=list(new),
                        stop=stop,
                        stop_tokens=stop_tokens,
                        temperature=0.0,
                    )
                    for number, one in zip(numbers, done, strict=True):
                        texts[number] = one.text
            return texts

        def _shortened(self, prompt: str, new: int) -> list[int]:
            """The prompt's last tokens, so that the new ones have room in the context."""
            room = max(1, model.spec.context - new)
            return self.tok_encode(prompt)[-room:] or [tokenizer.bos_id]

    return AssayLM()


def run_harness(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: list[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | None = None,
    fewshot: int | None = None,
    stop_tokens: Sequence[int] = (),
) -> dict[str, dict[str, Any]]:
    """The harness' own results of its tasks, by task: {metric: value}, standard errors among them.

    `include_path` is a folder of further task files (YAML), as the harness takes them; `fewshot`
    the number of examples before each question, the task's own where it is None.

    Raises:
        AssayError: if a task is unknown to the harness, or its documents are out of reach.
    """
    adapter = harness_model(model, tokenizer, batch_size=batch_size, stop_tokens=stop_tokens)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            raise AssayError(f"--harness: the harness has no task '{name}'; {near}")
    # Standard errors of means have a formula; of others, a bootstrap, here in this process.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        results = simple_evaluate(
            model=adapter,
            tasks=list(tasks),
            num_fewshot=fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )
    except (OSError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AssayError(
            f"--harness: the documents of {', '.join(tasks)} cannot be had ({reason})."
        ) from None
    return results["results"]
