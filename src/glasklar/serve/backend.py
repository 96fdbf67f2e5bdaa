"""What all routes stand on: the model's service, the run that is shown, the conversations."""

from __future__ import annotations

from dataclasses import dataclass, field

from glasklar.errors import CapacityError
from glasklar.serve.conversations import Conversations
from glasklar.serve.jobs import Jobs
from glasklar.serve.metrics import Metrics
from glasklar.serve.news import RunNews
from glasklar.serve.receipts import Receipts
from glasklar.serve.service import ModelService
from glasklar.serve.trace import Tracing


@dataclass(eq=False)
class Backend:
    """What the routes stand on. While a run is being made there is no service yet."""

    service: ModelService | None = None
    news: RunNews | None = None
    tracing: Tracing | None = None
    conversations: Conversations = field(default_factory=Conversations)
    jobs: Jobs = field(default_factory=Jobs)
    metrics: Metrics = field(default_factory=Metrics)
    receipts: Receipts | None = None
    failure: str | None = None

    @property
    def state(self) -> str:
        if self.failure is not None:
            return "failed"
        return "training" if self.service is None else "serving"

    def ready(self) -> ModelService:
        """The service. Raises CapacityError while the model is still being trained."""
        if self.service is None:
            raise CapacityError("the model is still being trained; watch it at / and ask again when it is done")
        return self.service

    def answers(self, reply: str) -> None:
        """From here on, answers made in this context belong to the reply with this id, and have receipts."""
        if self.receipts is not None:
            self.receipts.name(reply)
