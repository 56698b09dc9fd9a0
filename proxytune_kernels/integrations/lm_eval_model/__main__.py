"""lm_eval's own command line, with the model "proxytune" registered."""

from lm_eval.__main__ import cli_evaluate

import proxytune_kernels.integrations.lm_eval_model  # noqa: F401  (registers the model)

if __name__ == "__main__":
    cli_evaluate()
