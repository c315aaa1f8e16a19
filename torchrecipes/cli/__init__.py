"""The command `tune-style`: one module per verb, imported only when its verb is typed."""
