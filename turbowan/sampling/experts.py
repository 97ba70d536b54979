"""Which of two experts a step belongs to (Wan 2.2)."""


def expert_for(t: float, boundary: float) -> str:
    """ "high" (high noise) where t >= boundary, else "low".

    Args:
        t: time in 0..1 (noise share), unrounded.
        boundary: switch point in 0..1, 0.9 for Wan 2.2 image-to-video.
    """
    return "high" if t >= boundary else "low"
