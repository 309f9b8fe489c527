"""The page of `shortstack generate --report`: where each token left, what it saved, and what it cost in agreement."""
