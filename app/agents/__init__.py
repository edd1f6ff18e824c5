"""THE OUTSIDE WORLD: Claude, Python handlers, the bundled deployer. Knows nothing of how runs are kept.

What authors of handlers import:

    from app.agents import Context, Happened, NotHappened, Unknown, effects_once
"""

from app.agents.context import Context, Happened, NotHappened, Unknown, effects_once

__all__ = ["Context", "Happened", "NotHappened", "Unknown", "effects_once"]
