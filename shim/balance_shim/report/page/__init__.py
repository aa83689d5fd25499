"""The page of `balance-shim report`: one HTML file with everything in it."""
