"""Adapter from lmms-eval's model interface to a responder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from lmms_plugin.arguments import read_arguments
from lmms_plugin.ending import ends_the_command, in_command
from lmms_plugin.vlm.contracts.engine import ContinuationScore
from lmms_plugin.vlm.contracts.requests import read
from lmms_plugin.vlm.contracts.responding import Responder


class Likelihood(NamedTuple):
    """Score of a continuation in the form that lmms-eval's tasks take."""

    number: float
    is_greedy: bool

    def strip(self) -> str:
        """Appear empty to the response cache, from which a pair would return as a string that no task can read."""
        return ""


class HarnessModel(lmms):
    """Model that passes lmms-eval's requests to a responder, which a subclass creates.

    Attributes:
        responder: Responder to requests.
    """

    is_simple = False
    responder: Responder

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """Create from `--model_args`, which override what lmms-eval's command adds to them (`batch_size`, `device`)."""
        with ends_the_command():
            given = read_arguments(arg_string)
            added = {name: value for name, value in (additional_config or {}).items() if value is not None}
            if _is_unasked(added.get("batch_size")):
                del added["batch_size"]
            return cls(**{**added, **given})

    @property
    def batch_size(self) -> int:
        """Return the number of images answered together."""
        return self.responder.batch_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request; see `Responder.generate`."""
        return self.responder.generate(read(requests, self.task_dict))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer multi-round tasks; see `Responder.generate_rounds`."""
        return self.responder.generate_rounds(read(requests, self.task_dict))

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Score every request's continuation as lmms-eval's own models do, which contradicts its documentation.

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
        """Return the values for the results file besides speed."""
        return {}

    def clean(self) -> None:
        """Free the model.

        lmms-eval calls this when everything is answered. It is also given speed and figures for the results file here,
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


def _is_unasked(batch_size: object) -> bool:
    """Return whether a batch size is the one that lmms-eval's command passes where none is given.

    It passes the number 1 then; what is given on the command line is text. From Python, or from a file of evaluations,
    a number may have been given.
    """
    return type(batch_size) is int and batch_size == 1 and in_command(sys.argv)
