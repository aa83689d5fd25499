"""The live view of `balance-shim top`: follows the record of a training while it is written."""
