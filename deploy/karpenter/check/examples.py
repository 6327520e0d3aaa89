"""deploy/examples: schemas and conventions. Run by check/run."""

import common

common.finish("deploy/examples")
