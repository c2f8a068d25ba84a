"""Learning what somebody who buys again will buy on the next visit."""
