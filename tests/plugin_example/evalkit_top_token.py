from evalkit import Explanation


class TopToken:
    """Explains a feature by the token it fires on most."""

    name, version = "top-token", "1"

    async def explain(self, feature, examples, client):
        example = max(examples.positives, key=lambda example: example.peak)
        token = example.tokens[example.activations.index(example.peak)].strip()
        return Explanation(examples.source, feature, self.name, self.version, f"the token {token!r}")
