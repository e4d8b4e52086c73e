"""What the objective makes of rewards before they become advantages."""

from torch import Tensor


def soft_overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """
    To be added to the rewards of answers of so many tokens (DAPO, arXiv 2503.14476, equation 13). [K] -> [K]

    0 up to max_tokens − buffer_tokens, then linear down to −1 at max_tokens.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens: got {buffer_tokens}, expected 1 to max_tokens ({max_tokens})")
    free = max_tokens - buffer_tokens
    return ((free - lengths.float()) / buffer_tokens).clamp(-1.0, 0.0)
