"""Find reward hacking: `audit` lets degenerate policies compete with honest ones."""

from segrl.audit.judging import AuditReport, AuditRow, Verdict, audit

__all__ = ["AuditReport", "AuditRow", "Verdict", "audit"]
