"""Operators' work with accounts, keys, credit, usage and templates, for the commands and for the admin API.

Each method returns what is shown, ready for JSON: amounts are decimal strings in USD, times are RFC 3339. What can't be
done raises a GatewayError with source `client`; docs/errors.md lists the codes. Each change appends an audit event by
`actor`.
"""

import time
import uuid
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict, replace

from meshproxy.errors import Detail, GatewayError, Source, invalid
from meshproxy.ledger.directory import Directory, client_error
from meshproxy.ledger.ledger import Ledger, RefTaken
from meshproxy.ledger.records import GLOBAL, Balance, KeyUse
from meshproxy.ledger.store import Store
from meshproxy.ledger.usage_report import EVENT_DAYS, GROUP_ALIASES, find_usage_event, report, shown_event
from meshproxy.policy.principal import Account, Bounds, Key, KeyChange, Status, check_account_name, invalid_fields
from meshproxy.policy.template import Template, TemplateFields, render, to_public
from meshproxy.units import DAY_S, format_usd, in_usd, rfc3339

NOT_GIVEN = frozenset({"id", "account", "created_at", "hint"})  # fields of a key that a client can't give
MAX_NOTE = 512
MAX_REF = 128
MAX_GRACE_S = 90 * DAY_S
USAGE_SPAN_S = 30 * DAY_S  # of a report without `since`


class Administration:
    """The operations.

    `actor` is recorded in audit events. `clock` is Unix time in seconds. `whole_ids`: find keys by their complete id
    only, not by the beginning of an id or by the secret.
    """

    def __init__(
        self,
        store: Store,
        directory: Directory,
        ledger: Ledger,
        actor: str,
        clock: Callable[[], float] = time.time,
        *,
        whole_ids: bool = False,
    ) -> None:
        self.store = store
        self.directory = directory
        self.ledger = ledger
        self._actor = actor
        self._clock = clock
        self._whole_ids = whole_ids

    def acting_as(self, actor: str, *, whole_ids: bool = False) -> "Administration":
        """Return the same operations for another actor."""
        return Administration(self.store, self.directory, self.ledger, actor, self._clock, whole_ids=whole_ids)

    # keys

    async def create_key(self, account: str, change: KeyChange) -> dict[str, Any]:
        """Mint a key, and create its account if there is none. Only this result contains the secret, as `key`."""
        _check_account_name(account)
        draft = change.applied_to(Key("", account, 0))
        fields = {name: value for name, value in asdict(draft).items() if name not in NOT_GIVEN}
        secret, key = await self.directory.create_key(account, actor=self._actor, **fields)
        return {"key": secret, **_shown_key(key, self._clock())}

    async def keys(
        self, account: str | None = None, *, limit: int | None = None, after: str = ""
    ) -> list[dict[str, Any]]:
        """Return the keys of one account or of all, oldest first, with their spend.

        At most `limit` keys, those after the key id `after`. Raises GatewayError `key_not_found` if there is no such
        key.
        """
        if account is not None:
            await self._existing_account(account)
        known = await self.directory.list_keys(account)
        ids = [key.id for key in known]
        if after and after not in ids:
            raise _key_not_found(after)
        page = known[ids.index(after) + 1 if after else 0 :][:limit]
        uses: dict[str, KeyUse] = {}
        by_account: dict[str, list[str]] = {}
        for key in page:
            by_account.setdefault(key.account, []).append(key.id)
        for name, ids in by_account.items():
            uses |= zip(ids, await self.ledger.key_spends(name, ids), strict=True)
        return [_shown_key(key, self._clock(), uses[key.id]) for key in page]

    async def key(self, reference: str) -> dict[str, Any]:
        """Return a key without its secret. `reference` is an id, an unambiguous beginning of an id, or the secret."""
        key = await self._existing_key(reference)
        return _shown_key(key, self._clock(), (await self.ledger.key_spends(key.account, [key.id]))[0])

    async def key_limits(self, reference: str, bounds: Bounds) -> dict[str, Any]:
        """Change the given limits and budgets of a key, and return all of them."""
        key = await self.change_key(reference, KeyChange(bounds=bounds), action="key.limits")
        return {name: key[name] for name in ("id", "account", "limits", "budgets", "session_budgets")}

    async def change_key(self, reference: str, change: KeyChange, action: str = "key.update") -> dict[str, Any]:
        """Change the given fields of a key, preserving concurrent changes. 409 `key_revoked` for un-revoking."""
        key = await self._existing_key(reference)
        changed = await self.directory.change_key(key.id, change.applied_to, actor=self._actor, action=action)
        return _shown_key(changed or key, self._clock())

    async def set_key_status(self, reference: str, status: Status) -> dict[str, Any]:
        """Suspend, resume or revoke a key."""
        key = await self._existing_key(reference)
        changed = await self.directory.set_key_status(key.id, status, actor=self._actor)
        return _shown_key(changed or key, self._clock())

    async def rotate_key(self, reference: str, grace_s: float = 0) -> dict[str, Any]:
        """Give a key a new secret, which only this result contains. The old secret works for `grace_s` more."""
        if not 0 <= grace_s <= MAX_GRACE_S:
            message = f"The grace is at most {MAX_GRACE_S // DAY_S} days."
            raise GatewayError(Source.CLIENT, invalid(message, param="grace"))
        key = await self._existing_key(reference)
        rotated = await self.directory.rotate_key(key.id, grace_s=grace_s, actor=self._actor)
        if rotated is None:
            raise _key_not_found(reference)
        secret, changed = rotated
        until = rfc3339(self._clock() + grace_s) if grace_s else None
        return {"key": secret, **_shown_key(changed, self._clock()), "old_key_works_until": until}

    # accounts and credit

    async def accounts(self, *, limit: int | None = None, after: str = "") -> list[dict[str, Any]]:
        """Return accounts by name, with their credit: at most `limit`, those after the name `after`."""
        known = await self.directory.list_accounts()
        page = known[bisect_right([account.name for account in known], after) :][:limit]
        balances = await self.ledger.balances([account.name for account in page])
        return [
            {
                **_shown_credit(account.name, balance),
                **_shown_account(account),
                "spend": in_usd(asdict(balance.account_spend)),
            }
            for account, balance in zip(page, balances, strict=True)
        ]

    async def account_names(self, account: str | None = None) -> list[str]:
        """Return the given account's name, or all names. 404 `account_not_found` if the account doesn't exist."""
        if account is not None:
            return [(await self._existing_account(account)).name]
        return [existing.name for existing in await self.directory.list_accounts()]

    async def account(self, name: str) -> dict[str, Any]:
        """Return an account: credit, limits, budgets, spend, running requests and the number of keys."""
        account = await self._existing_account(name)
        balance = await self.ledger.balance(name)
        return {
            **_shown_credit(name, balance),
            **_shown_account(account),
            "spend": in_usd(asdict(balance.account_spend)),
            "running": balance.account_running,
            "keys": len(await self.directory.list_keys(name)),
        }

    async def account_limits(self, name: str, bounds: Bounds, status: Status | UnsetType = UNSET) -> dict[str, Any]:
        """Change the given limits, budgets and status of an account, and return all of them."""
        if bounds.session:
            raise invalid_fields(
                [Detail("extra_forbidden", ("body", "session_budget"), "Sessions have budgets by key")]
            )

        def change(account: Account) -> Account:
            return replace(
                account,
                limits=bounds.limits_after(account.limits),
                budgets=bounds.budgets_after(account.budgets),
                status=account.status if status is UNSET else status,
            )

        changed = await self.directory.change_account(name, change, actor=self._actor, action="account.limits")
        return {"account": name, **_shown_account(changed or await self._existing_account(name))}

    async def set_account_status(self, name: str, status: Status) -> dict[str, Any]:
        """Suspend or resume an account, and with it all its keys."""
        changed = await self.directory.set_account_status(name, status, actor=self._actor)
        return {"account": name, **_shown_account(changed or await self._existing_account(name))}

    async def delete_account(self, name: str) -> dict[str, Any]:
        """Delete an account and everything that Redis has of it, for good. 409 `account_busy` while it holds credit."""
        await self._existing_account(name)
        removed = await self.directory.delete_account(name, actor=self._actor)
        return {"account": name, "deleted": True, "records": removed or 0}

    async def credit(self, name: str) -> dict[str, Any]:
        """Return an account's balance, held and available credit."""
        await self._existing_account(name)
        return _shown_credit(name, await self.ledger.balance(name))

    async def grant(self, name: str, amount_nusd: int, note: str = "", ref: str | None = None) -> dict[str, Any]:
        """Add credit, or take it back with a negative amount, once for each `ref`. Creates a missing account.

        White space around a `ref` doesn't count. An empty one is refused: a script whose variable is empty would grant
        at each repetition.
        """
        _check_account_name(name)
        is_empty = ref is not None and not ref.strip()
        ref = (ref or "").strip()
        details = [
            Detail("string_too_long", ("body", field), f"At most {most} characters")
            for field, text, most in (("note", note, MAX_NOTE), ("ref", ref, MAX_REF))
            if len(text) > most
        ]
        if is_empty:
            details.append(Detail("string_too_short", ("body", "ref"), "Empty: leave it out, or name a payment"))
        if amount_nusd == 0:
            details.append(Detail("value_error", ("body", "amount_usd"), "There is nothing to grant"))
        if details:
            raise invalid_fields(details)
        await self.directory.ensure_account(name, actor=self._actor)
        amount_usd = format_usd(amount_nusd)
        try:
            granted = await self.ledger.grant(name, amount_nusd, note, ref=ref, actor=self._actor)
        except RefTaken as error:
            raise client_error(409, "ref_taken", str(error)) from error
        except ValueError as error:
            raise client_error(422, "balance_out_of_range", f"no balance may be so large: {amount_usd} USD") from error
        if granted.is_new:
            detail = {"amount_usd": amount_usd, "ref": ref, "note": note}
            await self.directory.append_audit_event(self._actor, "credit.grant", name, name, detail)
        shown = _shown_credit(name, await self.ledger.balance(name))
        return {**shown, "granted_now_usd": amount_usd if granted.is_new else "0.00"}

    async def grants(self, name: str) -> list[dict[str, Any]]:
        """Return the grants of an account, newest first."""
        await self._existing_account(name)
        return [_dated(grant, "granted_ms", "granted_at") for grant in await self.ledger.grants(name)]

    # usage

    async def usage(
        self,
        account: str | None = None,
        *,
        group_by: Sequence[str] = (),
        session_id: str | None = None,
        since: float | None = None,
        until: float | None = None,
        on_progress: Callable[[int, int], None] = lambda _done, _accounts: None,
    ) -> list[dict[str, Any]]:
        """Return a usage report by account and `group_by` (`session` is `session_id`); see `usage_report.report`."""
        now = self._clock()
        until = now if until is None else until
        return await report(
            self.store,
            lambda: self.account_names(account),
            group_by=[GROUP_ALIASES.get(name, name) for name in group_by],
            session_id=session_id,
            since=until - USAGE_SPAN_S if since is None else since,
            until=until,
            now=now,
            on_progress=on_progress,
        )

    async def request(self, request_id: str) -> dict[str, Any]:
        """Return one settled request: its caller, upstream, outcome and cost.

        404 `request_not_found` if it wasn't settled in the last EVENT_DAYS days.
        """
        now = datetime.fromtimestamp(self._clock(), UTC)
        event = await find_usage_event(self.store, await self.account_names(), request_id, now)
        if event is None:
            message = (
                f"no request {request_id[:128]!r} was settled in the last {EVENT_DAYS} days; one that still runs, or whose "
                "worker was killed, isn't settled, and one that was refused before it could cost anything (401, 402, 403, "
                "404, 422, 429, 503) is in the gateway's log alone: look there for its request_id and refused_by"
            )
            raise client_error(404, "request_not_found", message)
        return shown_event(event)

    async def audit(self, limit: int = 100) -> list[dict[str, Any]]:
        """Return the latest changes, newest first."""
        changes = [_dated(event, "at_ms", "at") for event in await self.directory.audit(limit)]
        return [{**change, "detail": msgspec.json.decode(change["detail"])} for change in changes]

    # templates

    async def put_template(self, owner: str | None, name: str, fields: TemplateFields) -> dict[str, Any]:
        """Create a template, or replace everything of an existing one but its id. `owner` None: a global template."""
        if owner is not None:
            _check_account_name(owner)
            await self.directory.ensure_account(owner, actor=self._actor)
        before = await self.own_template(owner, name)
        now = self._clock()
        new = Template(
            id=str(uuid.uuid4()), name=name, owner=owner, is_global=owner is None, created_at=now, updated_at=now
        )
        kept = {} if before is None else {"id": before.id, "created_at": before.created_at}
        template = fields.applied_to(replace(new, **kept))
        if not await self.directory.templates.put(template):
            raise client_error(409, "name_taken", f"another template {name} was made just now")
        await self.directory.append_audit_event(self._actor, "template.put", template.id, owner or "", {"name": name})
        return to_public(template)

    async def templates(self, owner: str | None = None) -> list[dict[str, Any]]:
        """Return the templates that an account can use, or all templates."""
        if owner is not None:
            await self._existing_account(owner)
            return [to_public(template) async for template in self.directory.templates.list(owner)]
        return [to_public(template) async for template in self._all_templates()]

    async def template(self, owner: str | None, name: str) -> dict[str, Any]:
        """Return the template that a request of this account would use, or the global one."""
        return to_public(await self._used_template(owner, name))

    async def rendered(self, owner: str | None, name: str, variables: dict[str, str]) -> Sequence[dict[str, Any]]:
        """Return the messages that a request with this template and these variables would send."""
        return render(await self._used_template(owner, name), variables)

    async def _used_template(self, owner: str | None, name: str) -> Template:
        if owner is not None:
            _check_account_name(owner)
        template = await self.directory.templates.find(owner or GLOBAL, name)
        if template is None:
            raise _template_not_found(owner, name)
        return template

    async def own_template(self, owner: str | None, name: str) -> Template | None:
        """Return the template of this name or id only if `owner` owns it."""
        template = await self.directory.templates.find(owner or GLOBAL, name)
        return template if template is not None and template.owner == owner else None

    async def delete_template(self, owner: str | None, name: str) -> dict[str, Any]:
        """Delete a template that `owner` owns."""
        template = await self.own_template(owner, name)
        if template is None or not await self.directory.templates.delete(template):
            raise _template_not_found(owner, name)
        await self.directory.append_audit_event(
            self._actor, "template.delete", template.id, owner or "", {"name": template.name}
        )
        return {"id": template.id, "name": template.name, "deleted": True}

    async def _all_templates(self) -> AsyncIterator[Template]:
        async for template in self.directory.templates.list(GLOBAL):
            yield template
        for owner in await self.directory.list_accounts():
            async for template in self.directory.templates.list(owner.name):
                if not template.is_global:
                    yield template

    async def _existing_account(self, name: str) -> Account:
        account = await self.directory.account(name)
        if account is None:
            raise client_error(404, "account_not_found", f"there is no account {name[:80]}")
        return account

    async def _existing_key(self, reference: str) -> Key:
        key = await self.directory.find_key(reference)
        if key is None or (self._whole_ids and reference != key.id):
            raise _key_not_found(reference)
        return key


def _shown_key(key: Key, now: float, use: KeyUse | None = None) -> dict[str, Any]:
    """Return a key as it is shown; with `use`, also its spend and its last use."""
    has_expired = key.status == "active" and key.expires_at is not None and key.expires_at <= now
    shown = {
        "id": key.id,
        "account": key.account,
        "name": key.name,
        "hint": key.hint,
        "status": "expired" if has_expired else key.status,
        "created_at": rfc3339(key.created_at),
        "expires_at": rfc3339(key.expires_at),
        "default_model": key.default_model,
        "models": key.models,
        "params": key.params,
        "clamp": key.clamp,
        "limits": asdict(key.limits),
        "budgets": in_usd(asdict(key.budgets)),
        "session_budgets": in_usd(asdict(key.session)),
    }
    if use is not None:
        shown["spend"] = in_usd(asdict(use.spend))
        shown["last_used_at"] = rfc3339(use.used_ms / 1000) if use.used_ms else None
    return shown


def _shown_credit(name: str, balance: Balance) -> dict[str, str]:
    """Return an account's credit: granted = balance + settled, available = balance - held."""
    amounts = ("balance_nusd", "held_nusd", "available_nusd", "granted_nusd", "settled_nusd")
    return {"account": name, **in_usd({amount: getattr(balance, amount) for amount in amounts})}


def _shown_account(account: Account) -> dict[str, Any]:
    return {"status": account.status, "limits": asdict(account.limits), "budgets": in_usd(asdict(account.budgets))}


def _dated(record: Struct, ms: str, at: str) -> dict[str, Any]:
    """Return a record as it is shown: with amounts in USD, and its time `ms` as `at`."""
    fields = in_usd(asdict(record))
    fields[at] = rfc3339(fields.pop(ms) / 1000)
    return fields


def _check_account_name(name: str) -> None:
    try:
        check_account_name(name)
    except ValueError as error:
        raise invalid_fields([Detail("value_error", ("body", "account"), str(error))]) from error


def _key_not_found(reference: str) -> GatewayError:
    shown = "with this secret" if reference.startswith("rsk_") else reference[:80]
    return client_error(404, "key_not_found", f"there is no key {shown}, or more than one")


def _template_not_found(owner: str | None, name: str) -> GatewayError:
    whose = "global template" if owner is None else f"template of {owner}"
    return client_error(404, "template_not_found", f"there is no {whose} {name[:128]}")
