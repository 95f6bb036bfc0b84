"""An order as a transaction: paid, reserved, shipped, in that order and each once; or undone.

PENSTOCK_BROKER=sqlite:///penstock.db python order.py
"""

import os

from penstock import App, TransactionAborted, TransactionCancelled, context, transaction

app = App(lease=5)  # seconds until others take over what a dead process had in hand


def note(what, **details):
    """The books of the shop, a line for each thing that was done. The key is the order's: who reads it knows what
    was done twice."""
    with open("books", "a") as books:
        print(what, context.message.id, *(f"{name}={value}" for name, value in details.items()), file=books)


def charge(amount):
    note("charged", amount=amount)
    return {"amount": amount, "receipt": f"R-{context.message.id[-4:]}"}


def refund(payment):  # gets what `charge` has returned
    note("refunded", receipt=payment["receipt"])


def reserve(article):
    if article == "anvil":
        raise TransactionCancelled("anvils are out of stock")  # what was done is undone
    note("reserved", article=article)
    return article


def release(article):
    note("released", article=article)


def ship(payment, article):
    if os.path.exists("strike"):
        raise ConnectionError("nobody drives today")  # the run is tried again, and goes on here
    note("shipped", receipt=payment["receipt"], article=article)
    return f"P-{context.message.id[-4:]}"


@app.task("order", retries=1, backoff=(0.1, 1))
async def order(request):
    if request["amount"] <= 0:
        raise ValueError("nothing to pay")
    async with transaction("order") as t:
        payment = await t.step("pay", charge, request["amount"], undo=refund)
        if request.get("stolen"):
            raise TransactionAborted("the card is stolen")  # nothing more is done, and nothing undone
        article = await t.step("reserve", reserve, request["article"], undo=release)
        parcel = await t.step("ship", ship, payment, article)
    return {"receipt": payment["receipt"], "parcel": parcel}


if __name__ == "__main__":
    app.run()
