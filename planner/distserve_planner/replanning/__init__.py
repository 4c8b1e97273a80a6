"""What a plan is worth under the traffic that really came: how that differs, and which roles would serve it better."""

from distserve_planner.replanning.drift import Shift, drift
from distserve_planner.replanning.roles import Change, Proposal, propose

__all__ = ["Change", "Proposal", "Shift", "drift", "propose"]
