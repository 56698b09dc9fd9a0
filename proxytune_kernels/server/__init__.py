"""An OpenAI-compatible server over the decoder, and the page that shows what steering changes.

``proxytune serve`` runs it; docs/serving.md says what it offers. It needs the extra ``serve``.
"""
