"""What `fairseq-train --user-dir fairseq_plugins` registers: models, criteria, schedulers and tasks."""

from . import criterions, lr_schedulers, models, optim, patches, tasks  # noqa: F401
