"""Numbers of things in messages: '1 tensor is missing', '2 tensors are missing'."""


def count_of(number: int, noun: str, verb: str = "", plural: str = "") -> str:
    """Returns a number and its noun, and after it a verb that agrees.

    Args:
      number: how many.
      noun: of one of them.
      verb: 'is' or 'has', as of one; '' for none.
      plural: of several, where it is not the noun with an s.
    """
    one = number == 1
    words = [f"{number:,}", noun if one else plural or f"{noun}s"]
    return " ".join([*words, verb if one else {"is": "are", "has": "have", "": ""}[verb]]).rstrip()
