"""Two observations side by side: only what differs, with the way to it."""


def differences(original, ours, path=""):
    """One line for each place where plain data differs."""
    if isinstance(original, dict) and isinstance(ours, dict):
        found = []
        for key in [*original, *(key for key in ours if key not in original)]:
            missing = "(nothing)"
            found += differences(original.get(key, missing), ours.get(key, missing), f"{path}[{key!r}]")
        return found
    if isinstance(original, list | tuple) and isinstance(ours, list | tuple) and len(original) == len(ours):
        found = []
        for index, (left, right) in enumerate(zip(original, ours, strict=True)):
            found += differences(left, right, f"{path}[{index}]")
        return found
    return [] if original == ours else [f"{path}\n    celery:   {original!r}\n    celeriac: {ours!r}"]
