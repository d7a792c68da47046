"""A model as lmms-eval runs it, whichever engine it has: requests in lmms-eval's form, answers in lmms-eval's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from lmms_plugin.arguments import read_arguments
from lmms_plugin.ending import ends_the_command
from lmms_plugin.vlm.contracts.engine import ContinuationScore
from lmms_plugin.vlm.contracts.requests import read
from lmms_plugin.vlm.contracts.responding import Responder


class Likelihood(NamedTuple):
    """What lmms-eval's tasks take for the score of a continuation."""

    number: float
    is_greedy: bool

    def strip(self) -> str:
        """Look empty to the response cache, from which a pair would come back as a string that no task can read."""
        return ""


class HarnessModel(lmms):
    """Hands lmms-eval's requests to a responder. A subclass makes the responder.

    Attributes:
        responder: what responds to requests.
    """

    is_simple = False
    responder: Responder

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """Take `--model_args`, which win over what lmms-eval's command adds to them (`batch_size`, `device`)."""
        with ends_the_command():
            given = read_arguments(arg_string)
            added = {name: value for name, value in (additional_config or {}).items() if value is not None}
            return cls(**{**added, **given})

    @property
    def batch_size(self) -> int:
        """Images answered together."""
        return self.responder.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request; see `Responder.generate`."""
        return self.responder.generate(read(requests, self.task_dict))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer tasks that ask again with earlier answers at hand; see `Responder.generate_rounds`."""
        return self.responder.generate_rounds(read(requests, self.task_dict))

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Score every request's continuation as lmms-eval's own models do, which is not as its documentation says.

        lmms-eval 0.7 takes the choice with the smallest number for the answer to a multiple-choice question, because
        its models return a loss. So a choice gets its negative log-likelihood (in nats, summed over its tokens), while
        for tasks of type `loglikelihood`, which compute perplexity, the number is the log-likelihood itself.

        Returns:
            For each request, as `text` of the result, the number and whether greedy decoding would write the
            continuation. (lmms-eval turns bare pairs into strings, which its own tasks then cannot read.)
        """
        choices = [isinstance(request.target, str) for request in read(requests, self.task_dict)]
        pairs = zip(choices, self.scores(requests), strict=True)
        return [
            GenerationResult(Likelihood(-score.total if choice else score.total, score.is_greedy))
            for choice, score in pairs
        ]

    def scores(self, requests: Sequence[Any]) -> list[ContinuationScore]:
        """Return the log-probabilities of every request's continuation, token by token."""
        return self.responder.scores(read(requests, self.task_dict))

    def figures(self) -> Mapping[str, Any]:
        """Return what goes into the results file besides speed."""
        return {}

    def clean(self) -> None:
        """Free the model.

        lmms-eval calls this when everything is answered. Here it is handed speed and figures for the results file,
        because a run whose answers all come from the cache never asks for one.
        """
        usage = self.responder.usage
        log_metrics(
            total_elapsed_time=usage.seconds,
            total_gen_tokens=usage.tokens,
            avg_speed=usage.speed,
            additional_metrics=self.figures(),
        )
        del self.responder
        super().clean()
