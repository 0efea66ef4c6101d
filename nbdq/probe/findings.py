"""How a check says what it has found, unless all is well."""


class Deviation(Exception):
    """The server does not keep the rule: what it did instead, in one line."""


class NotApplicable(Exception):
    """The rule is about something that this server or export does not have."""


def expect(condition: object, observed: str) -> None:
    """Deviate with what was ``observed`` unless ``condition`` holds."""
    if not condition:
        raise Deviation(observed)
