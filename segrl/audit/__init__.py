"""Does gaming a reward pay? `audit` lets policies that nobody wants compete with honest ones."""

from segrl.audit.judging import AuditReport, AuditRow, Verdict, audit

__all__ = ["AuditReport", "AuditRow", "Verdict", "audit"]
