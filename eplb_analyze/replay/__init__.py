"""Recorded loads under other load-balancer settings, and the advice drawn from them."""
