"""The training data of the example: shape, split, and every number in it.

The arithmetic is checked twice, and never with the code that made it. First from the question: the numbers are read out of
its text, the answer is worked out again by a rule that stands here, and it must be what the last sentence says. Then from
the answer: each "label = expression = result" is evaluated. Both are exact (Decimal), or rounded as the text says: half a
unit of the last digit goes up.
"""

import ast
import importlib.util
import json
import operator
import re
from collections import Counter
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "data"
TEXT = (FOLDER / "finance.jsonl").read_bytes()
RECORDS = [json.loads(line) for line in TEXT.splitlines()]
EXPLAINED = [record for record in RECORDS if record["kind"] == "explained"]
COMPUTED = [record for record in RECORDS if record["kind"] == "computed"]

# What a held-out text and its nearest neighbour in training may share of their character 5-grams. "What is a bear market?" and "What is
# a bull market?", different things asked in the same words, share 0.44. Explanations must differ more than questions do. A computed
# answer is little but its equation, and "ratio = # / # x 100 = #" is the shape of every percentage: there the limit is wider.
QUESTION_OVERLAP, EXPLANATION_OVERLAP, COMPUTATION_OVERLAP = 0.5, 0.4, 0.6


def question(record) -> str:
    return f"{record['instruction']} {record['input']}".strip()


def numbers(text: str) -> list[Decimal]:
    """Every number in the text, in order: '$1,250.50 at 4 percent' -> [1250.50, 4]."""
    return [Decimal(found.replace(",", "")) for found in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)]


def last_sentence(text: str) -> str:
    return text.split(". ")[-1]


# ---- shape -----------------------------------------------------------------------------------------------------------


def test_counts_are_what_the_readme_says():
    parts = Counter((record["kind"], record["split"]) for record in RECORDS)
    for kind, promised in (("explained", 450), ("computed", 250)):
        train, held_out = parts[kind, "train"], parts[kind, "held_out"]
        assert f"| `{kind}` | {train} | {held_out} |" in (FOLDER / "README.md").read_text(encoding="ascii")
        assert train >= promised and held_out >= 60


def test_every_line_has_the_same_keys_in_the_same_order():
    for record in RECORDS:
        name = {"explained": "subject", "computed": "template"}[record["kind"]]
        assert list(record) == ["instruction", "input", "output", "kind", name, "split"]
        assert all(isinstance(value, str) and value == value.strip() for value in record.values())
        assert all(value for key, value in record.items() if key != "input")
        assert record["split"] in ("train", "held_out")


def test_the_file_is_ascii_and_every_line_is_json_as_python_writes_it():
    TEXT.decode("ascii")
    assert TEXT.endswith(b"\n") and b"\r" not in TEXT
    assert TEXT.decode().splitlines() == [json.dumps(record) for record in RECORDS]
    assert not any(character in record[key] for record in RECORDS for key in ("instruction", "input", "output") for character in "\n\t%")


def test_lengths_are_within_bounds():
    for record in EXPLAINED:
        assert 25 <= len(record["output"].split()) <= 60, record["instruction"]
        assert len(question(record).split()) <= 40, record["instruction"]
    for record in COMPUTED:
        assert len(record["output"].split()) <= 60, record["instruction"]
        assert len(question(record).split()) <= 40, record["instruction"]


def test_every_answer_is_a_few_whole_sentences():
    for record in RECORDS:
        assert record["output"].endswith("."), record["output"]
        assert "  " not in question(record) + record["output"]
    for record in EXPLAINED:
        assert record["output"][0].isupper() and 1 <= len(re.findall(r"[.?!](?= |$)", record["output"])) <= 4, record["output"]
        assert "=" not in record["output"], "a calculation belongs to the computed records"


def test_money_is_written_in_one_way():
    for record in RECORDS:
        for text in (question(record), record["output"]):
            for found in re.findall(r"\$\S*", text):
                assert re.fullmatch(r"\$(0|[1-9]\d{0,2}(,\d{3})*)(\.\d\d)?[.,;?]?", found) and ".00" not in found, (found, text)
            for found in re.findall(r"\d{4,}", text):             # no comma: a year, or the decimals of a rate
                assert re.search(rf"\.{found}|\b(19|20)\d\ds?\b", text), (found, text)


# ---- split -----------------------------------------------------------------------------------------------------------


def test_no_question_is_asked_twice_and_no_explanation_given_twice():
    assert max(Counter(question(record).lower() for record in RECORDS).values()) == 1
    assert max(Counter(record["output"].lower() for record in EXPLAINED).values()) == 1


def test_a_subject_or_template_is_in_one_part_only():
    for kind, name in ((EXPLAINED, "subject"), (COMPUTED, "template")):
        parts = {}
        for record in kind:
            parts.setdefault(record[name].lower(), set()).add(record["split"])
        assert all(len(found) == 1 for found in parts.values())


def grams(text: str) -> frozenset:
    """The character 5-grams of a text; every number counts as one sign, or two calculations of one kind would look different."""
    text = re.sub(r"\d+(?:,\d{3})*(?:\.\d+)?", "#", text.lower())
    return frozenset(text[i : i + 5] for i in range(max(1, len(text) - 4)))


@pytest.mark.parametrize(
    ("records", "field", "limit"),
    [
        (EXPLAINED, question, QUESTION_OVERLAP),
        (COMPUTED, question, QUESTION_OVERLAP),
        (EXPLAINED, operator.itemgetter("output"), EXPLANATION_OVERLAP),
        (COMPUTED, operator.itemgetter("output"), COMPUTATION_OVERLAP),
    ],
    ids=["questions", "questions of computed", "explanations", "computations"],
)
def test_no_held_out_record_is_nearly_one_of_the_training_records(records, field, limit):
    train = [(grams(field(record)), field(record)) for record in records if record["split"] == "train"]
    for record in records:
        if record["split"] == "held_out":
            mine = grams(field(record))
            overlap, nearest = max((len(mine & other) / len(mine | other), text) for other, text in train)
            assert overlap < limit, (overlap, field(record), nearest)


def test_no_passage_that_the_base_read_is_about_a_held_out_subject():
    passages = (FOLDER / "plain_finance.txt").read_bytes().decode("ascii").rstrip("\n").split("\n<|endoftext|>\n")
    assert len(passages) == len({passage.lower() for passage in passages}) == 4116
    assert all(90 <= len(passage.split()) <= 144 and passage.endswith(".") and "\n" not in passage for passage in passages)
    held_out = [record for record in EXPLAINED if record["split"] == "held_out"]
    text = "\n".join(passages).lower()
    assert {record["subject"] for record in held_out if record["subject"].lower() in text} == set()
    # A passage is four times as long as an answer: what counts is how much of the answer it contains. One drawn at random holds a tenth
    # of it, the nearest of 400 a quarter; what a debit card is, half of what a prepaid card is.
    read = [grams(passage) for passage in passages]
    for record in held_out:
        mine = grams(record["output"])
        share, nearest = max((len(mine & other) / len(mine), text) for other, text in zip(read, passages, strict=True))
        assert share < 0.55, (share, record["output"], nearest)


def test_the_measure_of_overlap_sees_a_near_duplicate():
    same = "What is the interest on $2,000 at 5 percent?", "What is the interest on $300 at 4 percent?"
    assert grams(same[0]) == grams(same[1])
    assert not grams("What is a bond?") & grams("Explain insurance.")


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def annuity(principal, rate, months):
    """The equal payment whose discounted sum is the loan."""
    return principal / sum((1 + rate / 1200) ** -k for k in range(1, int(months) + 1))


# From the numbers of the question, in the order in which they stand there, to the numbers of the last sentence of the answer.
RULES = {
    "simple_interest": lambda principal, rate, years: principal * rate * years / 100,
    "simple_interest_months": lambda principal, rate, months: principal * rate * months / 1200,
    "loan_repaid_at_once": lambda principal, rate, years: principal + principal * rate * years / 100,
    "compound_two_years": lambda principal, rate: principal * ((100 + rate) / 100) ** 2,
    "present_value_one_year": lambda later, rate: later * 100 / (100 + rate),
    "present_value_two_years": lambda later, rate: later * 10000 / (100 + rate) ** 2,
    "net_present_value": lambda cost, inflow, rate: inflow * 100 / (100 + rate) - cost,
    "rule_of_72": lambda constant, rate: constant / rate,
    "loan_payment": annuity,
    "payment_per_thousand": lambda principal, unit, payment: principal * payment / unit,
    "interest_of_first_month": lambda balance, rate: balance * rate / 1200,
    "total_interest_paid": lambda principal, months, payment: months * payment - principal,
    "down_payment": lambda price, rate: price * (100 - rate) / 100,
    "loan_to_value": lambda mortgage, value: 100 * mortgage / value,
    "debt_to_income": lambda payments, income: 100 * payments / income,
    "card_utilization": lambda used, limit: 100 * used / limit,
    "budget_left_over": lambda income, rent, food, other: income - (rent + food + other),
    "net_worth": lambda house, savings, debt: house + savings - debt,
    "months_to_save": lambda goal, monthly: goal / monthly,
    "net_pay": lambda gross, rate, insurance: gross * (100 - rate) / 100 - insurance,
    "employer_match": lambda salary, rate: 2 * salary * rate / 100,
    "insurance_claim": lambda loss, deductible: loss - deductible,
    "medical_bill": lambda bill, rate: bill * rate / 100,
    "sales_tax": lambda price, rate: price * (100 + rate) / 100,
    "price_after_discount": lambda price, rate: price * (100 - rate) / 100,
    "income_tax_with_deduction": lambda income, deduction, rate: (income - deduction) * rate / 100,
    "tax_brackets": lambda income, low, limit, high: limit * low / 100 + (income - limit) * high / 100,
    "price_after_inflation": lambda price, rate: price * (100 + rate) / 100,
    "inflation_from_index": lambda before, after: 100 * after / before - 100,
    "real_interest_rate": lambda nominal, inflation: nominal - inflation,
    "currency_conversion": lambda rate, dollars: dollars * rate,
    "currency_into_dollars": lambda crowns, rate: crowns / rate,
    "bond_interest": lambda face, coupon, years: face * coupon * years / 100,
    "current_yield": lambda interest, price: 100 * interest / price,
    "bill_return": lambda price, face: 100 * face / price - 100,
    "dividend_yield": lambda price, dividend: 100 * dividend / price,
    "capital_gain": lambda shares, bought, sold: shares * sold - shares * bought,
    "total_return": lambda bought, sold, dividend: 100 * (sold + dividend) / bought - 100,
    "market_capitalization": lambda shares, price: shares * price,
    "earnings_per_share": lambda earnings, shares: earnings / shares,
    "price_earnings": lambda price, earnings: price / earnings,
    "stock_split": lambda shares, price, parts: (shares * parts, price / parts),
    "call_option": lambda strike, premium, price: price - strike - premium,
    "put_option": lambda premium, strike, price: strike - price - premium,
    "fund_fee": lambda rate, invested: invested * rate / 100,
    "portfolio_weight": lambda stocks, bonds: 100 * stocks / (stocks + bonds),
    "portfolio_return": lambda stocks, high, bonds, low: (stocks * high + bonds * low) / (stocks + bonds),
    "break_even": lambda fixed, price, cost: fixed / (price - cost),
    "gross_margin": lambda sales, cost: 100 - 100 * cost / sales,
    "net_margin": lambda revenue, income: 100 * income / revenue,
    "net_income": lambda revenue, wages, rent, other: revenue - (wages + rent + other),
    "owners_equity": lambda assets, liabilities: assets - liabilities,
    "current_ratio": lambda assets, liabilities: assets / liabilities,
    "debt_to_equity": lambda debts, equity: debts / equity,
    "return_on_equity": lambda income, equity: 100 * income / equity,
    "depreciation": lambda cost, years, salvage: (cost - salvage) / years,
    "payback_period": lambda cost, yearly: cost / yearly,
    "gdp": lambda consumption, investment, government, exports, imports: consumption + investment + government + exports - imports,
    "unemployment_rate": lambda employed, unemployed: 100 * unemployed / (employed + unemployed),
    "trade_balance": lambda exports, imports: abs(exports - imports),
    "bank_reserves": lambda deposits, rate: deposits * (100 - rate) / 100,
}


def rounded(value: Decimal, places: int) -> Decimal:
    return value.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)


def test_every_template_has_a_rule_and_every_rule_a_template():
    assert set(RULES) == {record["template"] for record in COMPUTED}


@pytest.mark.parametrize("template", RULES)
def test_the_answer_follows_from_the_numbers_of_the_question(template):
    for record in COMPUTED:
        if record["template"] != template:
            continue
        expected = RULES[template](*numbers(question(record)))
        expected = expected if isinstance(expected, tuple) else (expected,)
        said = last_sentence(record["output"])
        places = 2 if "$" in said else 1                          # cents, or a tenth of a percent
        assert [rounded(value, places) for value in expected] == numbers(said), record
        # Rounding is said aloud, and only where there is some. Dividing by 1.05 and the like is exact here, but for the 28th digit.
        exact = all(abs(value - rounded(value, places)) < Decimal("1e-20") for value in expected)
        assert exact == ("(rounded)" not in record["output"]), record


# The same for the examples inside explanations: the numbers of input and output, in order, and what must hold between them.
EXAMPLES = {
    "Does this household have enough money for emergencies?": lambda month, saved, more: saved / month == 1.5 and saved + more == 3 * month,
    "What is net worth?": lambda assets, debts, worth: assets - debts == worth,
    "Find the net worth and explain it.": lambda house, saved, debt, assets, owed, worth: (
        house + saved == assets and debt == owed and assets - owed == worth
    ),
    "What is credit utilization?": lambda used, limit, share: 100 * used == share * limit,
    "What is the debt-to-income ratio of a household?": lambda payments, income, share: 100 * payments == share * income,
    "Which debt should be paid first?": lambda card, high, student, low, spare: high > low,
    "What is an interest rate?": lambda rate, loan, cost: loan * rate == 100 * cost,
    "Which loan costs less in total?": lambda n, short, m, long, first, second, more: (
        n * short == first and m * long == second and second - first == more and long < short
    ),
    "What is a down payment?": lambda price, share, down: price * share == 100 * down,
    "What is the coupon of a bond?": lambda face, rate, interest: face * rate == 100 * interest,
    "What is the yield of a bond?": lambda interest, price, rate: 100 * interest == price * rate,
    "How does the holder of a Treasury bill earn a return?": lambda price, face, gain: face - price == gain,
    "What is the dividend yield of a stock?": lambda price, dividend, rate: 100 * dividend == price * rate,
    "Which of the two stocks has the higher dividend yield?": lambda price_a, a, price_b, b, rate_a, rate_b: (
        100 * a == price_a * rate_a and 100 * b == price_b * rate_b and rate_a > rate_b and b > a
    ),
    "What is the price-earnings ratio of a stock?": lambda price, earnings, ratio: price == earnings * ratio,
    "What are earnings per share?": lambda earnings, shares, each: earnings == shares * each,
    "What is market capitalization?": lambda shares, price, value: shares * price == value,
    "What is a stock split?": lambda shares, price, more, lower: more == 2 * shares and shares * price == more * lower,
    "What is a capital gain?": lambda bought, sold, gain: sold - bought == gain,
    "What does it cost to buy a share and sell it at once?": lambda bid, ask, paid, received, loss: (
        (ask, bid) == (paid, received) and paid - received == loss
    ),
    "What is the expense ratio of a fund?": lambda rate, fee, invested: invested * rate == 100 * fee,
    "Which fund leaves the investor with more money?": lambda low, high, kept: low == kept < high,
    "How is the net asset value of a fund calculated?": lambda assets, debts, shares, net, same, each: (
        assets - debts == net and shares == same and net == shares * each
    ),
    "What is an insurance deductible?": lambda deductible, loss, paid: loss - deductible == paid,
    "How much will the insurer pay?": lambda loss, deductible, own, paid, limit: own == limit == deductible and loss - own == paid,
    "What is a marginal tax rate?": lambda more, tax, rate: 100 * tax == more * rate,
    "Should the worker refuse the raise because of the higher tax rate?": lambda more, rate, other, tax, kept: (
        more * rate == 100 * tax and more - tax == kept and other < rate
    ),
    "What is a tax deduction?": lambda rate, deduction, saved: deduction * rate == 100 * saved,
    "What is a tax credit?": lambda tax, credit, paid: tax - credit == paid,
    "What is a sales tax?": lambda rate, tax, price: price * rate == 100 * tax,
    "What is revenue?": lambda coats, price, revenue: coats * price == revenue,
    "What is gross profit?": lambda sales, cost, profit: sales - cost == profit,
    "Can the firm pay its bills?": lambda current, goods, due, capital, ready, bills: (
        current - due == capital and current - goods == ready < bills == due
    ),
    "How can borrowing raise the return on equity?": lambda cost, earned, same: cost == same < earned,
    "What is the future value of a deposit?": lambda today, rate, later: today * (100 + rate) == 100 * later,
    "What is the opportunity cost of this choice?": lambda saved, rate, same_rate, same, interest: (
        (saved, rate) == (same, same_rate) and saved * rate == 100 * interest
    ),
    "What is the real interest rate?": lambda nominal, inflation, real: nominal - inflation == real,
    "Which deposit leaves the saver better off?": lambda nominal, inflation, other, low, second, first: (
        nominal - inflation == first and other - low == second > first
    ),
    "How is the consumer price index used?": lambda before, after, rate: 100 * after == before * (100 + rate),
    "What is an exchange rate?": lambda rate, dollars, euros: rate * euros == dollars,
    "What is the duration of a bond?": lambda years, fall, rise: years * rise == fall,
    "When does the owner of a call option use it?": lambda fixed, market, gain: market - fixed == gain,
    "Why should people begin to save for retirement when they are young?": lambda rate, early, late: (
        abs((1 + rate / 100) ** 10 - 2) < Decimal("0.05") and early < late
    ),
    "Who will have more at the age of 65?": lambda a, b, c, d, e, f, rate: a == d and c - b == f - e,
}


def test_every_example_inside_an_explanation_is_right():
    checked = set()
    for record in EXPLAINED:
        found = numbers(record["input"]) + numbers(record["output"])
        if len(found) >= 3:                                       # two numbers alone calculate nothing
            assert EXAMPLES[record["instruction"]](*found), record
            checked.add(record["instruction"])
    assert checked == set(EXAMPLES)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow}


def evaluate(expression: str) -> Decimal:
    """'1,000 x 0.01 / (1 - 1 / 1.01^12)' in decimal arithmetic."""

    def walk(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        return Decimal(ast.unparse(node))

    return walk(ast.parse(expression.replace(",", "").replace(" x ", " * ").replace("^", "**"), mode="eval").body)


def test_the_evaluator_works_on_an_example_done_by_hand():
    assert evaluate("1,000 x 1.05 - 50") == 1000
    assert rounded(evaluate("1,000 x 0.01 / (1 - 1 / 1.01^2)"), 2) == Decimal("507.51")        # 10 / (1 - 0.98030) = 507.51


def test_every_equation_in_an_answer_holds():
    for record in COMPUTED:
        equations = [sentence for sentence in record["output"].removesuffix(".").split(". ") if "=" in sentence]
        assert equations, record
        for sentence in equations:
            sentence, marked = sentence.removesuffix(" (rounded)"), sentence.endswith(" (rounded)")
            left, result = re.split(r": | = ", sentence, maxsplit=1)[1].rsplit(" = ", 1)
            value, shown = evaluate(left), Decimal(result.replace(",", ""))
            assert rounded(value, len(result.partition(".")[2])) == shown and (value == shown) == (not marked), (sentence, value)


def test_a_trade_balance_has_the_right_sign():
    for record in COMPUTED:
        if record["template"] == "trade_balance":
            exports, imports = numbers(question(record))
            assert ("surplus" in last_sentence(record["output"])) == (exports > imports) and exports != imports


def test_the_computed_part_is_what_the_script_makes_byte_for_byte():
    spec = importlib.util.spec_from_file_location("make_computed", FOLDER / "make_computed.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = [line.encode("ascii") for line in script.lines()]
    assert made == [line for line, record in zip(TEXT.splitlines(), RECORDS, strict=True) if record["kind"] == "computed"]
    assert made == TEXT.splitlines()[len(EXPLAINED) :]            # and the explained ones stand before them
