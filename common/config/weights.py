"""The section `[weights]`: by which way a version gets from the learner to its actors."""

from pydantic import Field

from common.config.section import Count, Seconds, Section


class Weights(Section):
    relay: Count = Field(
        0, description="actors that one actor passes a version on to; 0: everyone fetches from the learner"
    )
    relay_timeout_s: Seconds = Field(
        3.0, description="an actor that passes nothing on for longer is given up, and the learner asked"
    )
