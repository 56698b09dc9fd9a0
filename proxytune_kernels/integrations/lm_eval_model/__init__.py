"""The trio as a model of lm_eval (EleutherAI's lm-evaluation-harness), registered as "proxytune".

Importing this registers it. docs/lm_eval.md says how to run it.
"""

from proxytune_kernels.integrations.lm_eval_model.model import (
    ProxyTuneLM,
    document_scores,
    evaluate_alphas,
)

__all__ = ["ProxyTuneLM", "document_scores", "evaluate_alphas"]
