"""Make the computed records of finance.jsonl: questions whose answer is a short calculation.

    python examples/data/make_computed.py            # print the computed records, one JSON object a line
    python examples/data/make_computed.py --write    # put them into finance.jsonl, behind the explained ones

The explained records of finance.jsonl are written by hand and are kept as they are. The computed ones come from the
functions below, one a template. A function picks its numbers, works out the answer in decimal arithmetic, and returns
question, input and answer:

    How much simple interest is earned on $2,000 at 5 percent a year in 3 years?
    Interest = 2,000 x 0.05 x 3 = 300. The interest is $300.

Three rules hold for every record, and tests/test_finance_data.py recomputes each one from the numbers in its text:

    money    $1,250 or $1,250.50: commas, and cents only where there are any
    steps    "label = expression = result"; x is times; the result is exact, or says "(rounded)": half a unit goes up
    numbers  small and round, because the model that learns from them is small too

The split goes by template: all records of a template are in one part. A held-out question asks for a calculation that was
not shown in training, although its neighbours were (the margin on gross profit there, the margin on net income here).
"""

import argparse
import json
import random
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

DATA = Path(__file__).resolve().parent / "finance.jsonl"
RECORDS = 6                                    # a template

AMOUNTS = [200, 300, 400, 500, 600, 800, 1000, 1200, 1500, 2000, 2500, 3000, 4000, 5000, 6000, 8000, 10000]
RATES = [2, 3, 4, 5, 6, 8, 10]                 # percent a year
YEARS = [2, 3, 4, 5, 6, 8, 10]
HOUSES = [100000, 120000, 150000, 160000, 180000, 200000, 240000, 250000, 300000, 400000]
TENS = [10, 20, 30, 40, 50, 60, 80]            # prices of a share, percentages
NAMES = ["Anna", "David", "Maria", "Peter", "Ruth", "Samuel", "Clara", "Henry"]


class Pick:
    """Choices that are the same everywhere. Of Python's generators only random() promises to stay as it is: we use no other."""

    def __init__(self, seed: str):
        self.random = random.Random(seed).random

    def __call__(self, options):
        return options[int(self.random() * len(options))]

    def amount(self, options) -> Decimal:
        return Decimal(self(options))


def number(value, places: int = 2) -> str:
    """1250 -> '1,250', 1250.5 -> '1,250.50', rounded to `places` decimals if it has more."""
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    return f"{rounded:,f}" if rounded != rounded.to_integral_value() else f"{rounded:,.0f}"


def money(value) -> str:
    return "$" + number(value)


def plain(value) -> str:
    """A rate, a ratio or an index without the zeros at its end: 0.050 -> '0.05', 12.0 -> '12'."""
    text = f"{Decimal(value):,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def result(value, places: int = 2) -> str:
    """The right side of an equation; it says so when it had to be rounded."""
    value = Decimal(value)
    shown = number(value, places)
    return shown if Decimal(shown.replace(",", "")) == value else f"{shown} (rounded)"


def percent(value) -> str:
    """A share of one as a percentage with at most one decimal: 0.125 -> '12.5'."""
    return plain((Decimal(value) * 100).quantize(Decimal("0.1"), ROUND_HALF_UP))


def share(label: str, part, whole, sentence: str) -> str:
    """The answer whose result is a percentage: part / whole x 100."""
    value, shown = Decimal(part) / Decimal(whole), percent(Decimal(part) / Decimal(whole))
    rounded = "" if Decimal(shown) == value * 100 else " (rounded)"
    return f"{label} = {number(part)} / {number(whole)} x 100 = {shown}{rounded}. {sentence} {shown} percent."


# ---- interest and time -----------------------------------------------------------------------------------------------


def simple_interest(pick):
    principal, rate, years = pick.amount(AMOUNTS), pick.amount(RATES), pick.amount(YEARS)
    interest = principal * rate / 100 * years
    return (
        pick([
            f"How much simple interest is earned on {money(principal)} at {rate} percent a year in {years} years?",
            f"A loan of {money(principal)} carries simple interest of {rate} percent a year. What is the interest for {years} years?",
        ]),
        "",
        f"Interest = {number(principal)} x {plain(rate / 100)} x {years} = {result(interest)}. The interest is {money(interest)}.",
    )


def simple_interest_months(pick):
    principal, rate = pick.amount([600, 1200, 1800, 2400, 3000, 3600, 6000]), pick.amount([2, 4, 5, 6, 8, 10])
    months = pick.amount([3, 4, 6, 8, 9])
    monthly = principal * rate / 100 / 12
    return (
        "Find the interest charged for part of a year: "
        f"{money(principal)} is lent at {rate} percent a year and repaid after {months} months.",
        "",
        f"One month costs: {number(principal)} x {plain(rate / 100)} / 12 = {result(monthly)}. "
        f"All months: {number(monthly)} x {months} = {result(monthly * months)}. The interest is {money(monthly * months)}.",
    )


def loan_repaid_at_once(pick):
    name, principal, rate, years = pick(NAMES), pick.amount(AMOUNTS), pick.amount(RATES), pick.amount([2, 3, 4, 5])
    interest = principal * rate / 100 * years
    return (
        f"{name} borrows {money(principal)} at {rate} percent simple interest a year and repays everything after {years} years. "
        "How much must be repaid?",
        "",
        f"Interest = {number(principal)} x {plain(rate / 100)} x {years} = {result(interest)}. "
        f"Total = {number(principal)} + {number(interest)} = {result(principal + interest)}. "
        f"The amount to be repaid is {money(principal + interest)}.",
    )


def compound_two_years(pick):
    principal, rate = pick.amount([100, 200, 300, 400, 500, 1000, 2000, 3000, 5000, 10000]), pick.amount([2, 3, 4, 5, 10, 20])
    first = principal * (1 + rate / 100)
    second = first * (1 + rate / 100)
    factor = plain(1 + rate / 100)
    return (
        pick([
            f"A deposit of {money(principal)} earns {rate} percent a year, compounded yearly. What is the balance after two years?",
            f"What does {money(principal)} grow to in two years at {rate} percent compound interest a year?",
        ]),
        "",
        f"After one year: {number(principal)} x {factor} = {result(first)}. "
        f"After two years: {number(first)} x {factor} = {result(second)}. The balance is {money(second)}.",
    )


def present_value_one_year(pick):
    today, rate = pick.amount([100, 200, 300, 400, 500, 600, 800, 1000, 2000, 5000]), pick.amount([2, 4, 5, 8, 10, 20])
    later = today * (1 + rate / 100)
    return (
        pick([
            f"What is the present value of {money(later)} due in one year when the discount rate is {rate} percent?",
            f"How much is a payment of {money(later)} in one year worth today at an interest rate of {rate} percent?",
        ]),
        "",
        f"Present value = {number(later)} / {plain(1 + rate / 100)} = {result(today)}. The present value is {money(today)}.",
    )


def present_value_two_years(pick):
    today, rate = pick.amount([100, 200, 300, 500, 1000, 2000, 3000]), pick.amount([5, 10, 20])
    factor = 1 + rate / 100
    later = today * factor * factor
    return (
        f"An investor will receive {money(later)} after two years and requires a return of {rate} percent a year. "
        "What should the investor pay for it now?",
        "",
        f"A year earlier it is worth: {number(later)} / {plain(factor)} = {result(today * factor)}. "
        f"Today: {number(today * factor)} / {plain(factor)} = {result(today)}. The investor should pay {money(today)}.",
    )


def net_present_value(pick):
    value, rate, cost = pick.amount([200, 300, 400, 500, 1000, 2000]), pick.amount([5, 10, 20]), pick.amount([50, 80, 100, 120, 150])
    inflow = value * (1 + rate / 100)
    return (
        f"A project costs {money(value - cost)} today and returns {money(inflow)} in one year. "
        f"What is its net present value at a discount rate of {rate} percent?",
        "",
        f"Present value = {number(inflow)} / {plain(1 + rate / 100)} = {result(value)}. "
        f"Net present value = {number(value)} - {number(value - cost)} = {result(cost)}. The net present value is {money(cost)}.",
    )


def rule_of_72(pick):
    rate = pick.amount([2, 3, 4, 6, 8, 9, 12])
    return (
        f"By the rule of 72, in about how many years does money double at {rate} percent a year?",
        "",
        f"Years = 72 / {rate} = {result(72 / rate)}. The money doubles in about {number(72 / rate)} years.",
    )


# ---- loans -----------------------------------------------------------------------------------------------------------


def loan_payment(pick):
    principal, rate, months = pick.amount([1000, 2000, 3000, 5000, 10000]), pick.amount([6, 12, 24]), pick.amount([6, 12, 24, 36])
    monthly = rate / 1200
    payment = principal * monthly / (1 - 1 / (1 + monthly) ** int(months))
    return (
        "What is the monthly payment on this loan?",
        f"Amount: {money(principal)}. Interest: {rate} percent a year, charged monthly. Term: {months} equal monthly payments.",
        f"Monthly rate = {rate} / 12 / 100 = {plain(monthly)}. "
        f"Payment = {number(principal)} x {plain(monthly)} / (1 - 1 / {plain(1 + monthly)}^{months}) = {result(payment)}. "
        f"The payment is {money(payment)}.",
    )


def payment_per_thousand(pick):
    principal, payment = pick.amount([50000, 60000, 80000, 100000, 120000, 150000, 200000, 250000]), pick.amount([5, 6, 7, 8])
    total = principal / 1000 * payment
    return (
        f"A family borrows {money(principal)}. Each {money(1000)} of the loan costs {money(payment)} a month. What is the monthly payment?",
        "",
        f"Payment = {number(principal)} / 1,000 x {payment} = {result(total)}. The monthly payment is {money(total)}.",
    )


def interest_of_first_month(pick):
    question, balances, rates = pick([
        ("The balance of a loan is {} and the yearly rate is {} percent. How much interest is due for one month?",
         [6000, 12000, 24000, 120000, 150000], [3, 4, 6, 8]),
        ("A card holder owes {} at {} percent a year. What is the interest for one month?", [500, 800, 1200, 2000, 3000], [12, 18, 24]),
    ])
    balance, rate = pick.amount(balances), pick.amount(rates)
    interest = balance * rate / 100 / 12
    return (
        question.format(money(balance), rate),
        "",
        f"Interest = {number(balance)} x {plain(rate / 100)} / 12 = {result(interest)}. The interest for the month is {money(interest)}.",
    )


def total_interest_paid(pick):
    payment, months = pick.amount([100, 150, 200, 250, 300, 400]), pick.amount([12, 24, 36, 48])
    interest = pick.amount([100, 150, 200, 300, 400, 500])
    principal = payment * months - interest
    return (
        f"A loan of {money(principal)} is repaid in {months} monthly payments of {money(payment)}. How much interest is paid in all?",
        "",
        f"Paid = {months} x {number(payment)} = {result(payment * months)}. "
        f"Interest = {number(payment * months)} - {number(principal)} = {result(interest)}. The total interest is {money(interest)}.",
    )


def down_payment(pick):
    price, rate = pick.amount(HOUSES), pick.amount([5, 10, 20, 25])
    down = price * rate / 100
    return (
        f"A house costs {money(price)}, and the buyer makes a down payment of {rate} percent. How large is the loan?",
        "",
        f"Down payment = {number(price)} x {plain(rate / 100)} = {result(down)}. Loan = {number(price)} - {number(down)} = "
        f"{result(price - down)}. The loan is {money(price - down)}.",
    )


def loan_to_value(pick):
    price, rate = pick.amount(HOUSES), pick.amount([50, 60, 70, 75, 80, 90])
    return (
        "Work out the ratio of the mortgage to the value of the property.",
        f"Mortgage: {money(price * rate / 100)}. Value of the property: {money(price)}.",
        share("Loan-to-value ratio", price * rate / 100, price, "The loan-to-value ratio is"),
    )


def debt_to_income(pick):
    income, rate = pick.amount([2000, 2500, 3000, 4000, 5000, 6000]), pick.amount([10, 15, 20, 25, 30, 40, 45])
    return (
        f"A household pays {money(income * rate / 100)} a month on its debts and earns {money(income)} a month. "
        "What is its debt-to-income ratio?",
        "",
        share("Ratio", income * rate / 100, income, "The debt-to-income ratio is"),
    )


def card_utilization(pick):
    limit, rate = pick.amount([500, 1000, 2000, 4000, 5000]), pick.amount([10, 15, 20, 30, 40, 60])
    return (
        f"{pick(NAMES)} has used {money(limit * rate / 100)} of a credit card limit of {money(limit)}. What part of the limit is in use?",
        "",
        share("Utilization", limit * rate / 100, limit, "The part in use is"),
    )


# ---- households ------------------------------------------------------------------------------------------------------


def budget_left_over(pick):
    income, rent, food = pick.amount([2000, 2400, 2800, 3000, 3500, 4000]), pick.amount([700, 800, 900, 1000]), pick.amount([300, 400, 500])
    other = pick.amount([200, 300, 400])
    left = income - rent - food - other
    return (
        "How much of the monthly income is left after the expenses?",
        f"Income: {money(income)}. Rent: {money(rent)}. Food: {money(food)}. Other expenses: {money(other)}.",
        f"Left = {number(income)} - {number(rent)} - {number(food)} - {number(other)} = {result(left)}. {money(left)} is left.",
    )


def net_worth(pick):
    house, savings, debt = pick.amount(HOUSES), pick.amount([5000, 10000, 15000, 20000, 30000]), pick.amount([40000, 50000, 60000, 80000])
    worth = house + savings - debt
    return (
        f"A family owns a house worth {money(house)} and savings of {money(savings)}, and it owes {money(debt)}. What is its net worth?",
        "",
        f"Net worth = {number(house)} + {number(savings)} - {number(debt)} = {result(worth)}. The net worth is {money(worth)}.",
    )


def months_to_save(pick):
    monthly, months = pick.amount([50, 100, 150, 200, 250, 300, 400]), pick.amount([4, 5, 6, 8, 10, 12, 15, 20])
    return (
        f"{pick(NAMES)} wants to save {money(monthly * months)} and puts aside {money(monthly)} each month. How many months does it take?",
        "",
        f"Months = {number(monthly * months)} / {number(monthly)} = {result(months)}. It takes {months} months.",
    )


def net_pay(pick):
    gross, tax, other = pick.amount([2000, 2500, 3000, 4000, 5000]), pick.amount([10, 15, 20, 25]), pick.amount([50, 100, 150, 200])
    withheld = gross * tax / 100
    return (
        f"A worker earns {money(gross)} a month. Tax of {tax} percent and {money(other)} for insurance are withheld. What is the net pay?",
        "",
        f"Tax = {number(gross)} x {plain(tax / 100)} = {result(withheld)}. "
        f"Net pay = {number(gross)} - {number(withheld)} - {number(other)} = {result(gross - withheld - other)}. "
        f"The net pay is {money(gross - withheld - other)}.",
    )


def employer_match(pick):
    salary, rate = pick.amount([20000, 30000, 40000, 50000, 60000, 80000]), pick.amount([2, 3, 4, 5, 6])
    own = salary * rate / 100
    return (
        f"A worker with a salary of {money(salary)} saves {rate} percent of it for retirement, and the employer adds the same amount. "
        "How much is saved in a year?",
        "",
        f"Own saving = {number(salary)} x {plain(rate / 100)} = {result(own)}. Total = {number(own)} + {number(own)} = {result(own * 2)}. "
        f"The total saving is {money(own * 2)} a year.",
    )


def insurance_claim(pick):
    loss, deductible = pick.amount([1500, 2000, 2500, 3000, 4000, 5000, 8000]), pick.amount([200, 250, 500, 1000])
    return (
        f"A storm causes a loss of {money(loss)}, and the insurance has a deductible of {money(deductible)}. "
        "How much does the insurer pay?",
        "",
        f"Payment = {number(loss)} - {number(deductible)} = {result(loss - deductible)}. The insurer pays {money(loss - deductible)}.",
    )


def medical_bill(pick):
    bill, rate = pick.amount([500, 800, 1000, 1500, 2000, 3000, 4000]), pick.amount([10, 20, 25, 30])
    return (
        f"The hospital sends a bill for {money(bill)}, of which the patient must bear {rate} percent. What does the patient pay?",
        "",
        f"Patient = {number(bill)} x {plain(rate / 100)} = {result(bill * rate / 100)}. The patient pays {money(bill * rate / 100)}.",
    )


# ---- prices, taxes, currencies ---------------------------------------------------------------------------------------


def sales_tax(pick):
    price, rate = pick.amount([20, 40, 50, 60, 80, 100, 150, 200, 300, 500]), pick.amount([4, 5, 6, 8, 10])
    tax = price * rate / 100
    return (
        f"An item is priced at {money(price)} before a sales tax of {rate} percent. What does the customer pay?",
        "",
        f"Tax = {number(price)} x {plain(rate / 100)} = {result(tax)}. Total = {number(price)} + {number(tax)} = {result(price + tax)}. "
        f"The customer pays {money(price + tax)}.",
    )


def price_after_discount(pick):
    price, rate = pick.amount([20, 40, 50, 60, 80, 100, 120, 200, 400]), pick.amount([5, 10, 15, 20, 25, 30, 40, 50])
    cut = price * rate / 100
    return (
        f"A coat that costs {money(price)} is sold at a discount of {rate} percent. What is the new price?",
        "",
        f"Discount = {number(price)} x {plain(rate / 100)} = {result(cut)}. New price = {number(price)} - {number(cut)} = "
        f"{result(price - cut)}. The new price is {money(price - cut)}.",
    )


def income_tax_with_deduction(pick):
    income, deduction = pick.amount([20000, 25000, 30000, 40000, 50000, 60000]), pick.amount([2000, 5000, 8000, 10000])
    rate = pick.amount([10, 15, 20, 25])
    taxed = income - deduction
    return (
        f"Income is {money(income)}, the deduction is {money(deduction)}, and the tax rate is {rate} percent. How much tax is due?",
        "",
        f"Taxable income = {number(income)} - {number(deduction)} = {result(taxed)}. "
        f"Tax = {number(taxed)} x {plain(rate / 100)} = {result(taxed * rate / 100)}. The tax is {money(taxed * rate / 100)}.",
    )


def tax_brackets(pick):
    limit, above = pick.amount([10000, 20000, 30000]), pick.amount([5000, 10000, 15000, 20000])
    low, high = pick(((10, 20), (10, 25), (15, 30), (5, 15)))
    first, second = limit * low / 100, above * high / 100
    return (
        "What is the tax on this income?",
        f"Income: {money(limit + above)}. The rate is {low} percent on the first {money(limit)} and {high} percent on the rest.",
        f"First part = {number(limit)} x {plain(Decimal(low) / 100)} = {result(first)}. "
        f"Rest = {number(above)} x {plain(Decimal(high) / 100)} = {result(second)}. "
        f"Tax = {number(first)} + {number(second)} = {result(first + second)}. The tax is {money(first + second)}.",
    )


def price_after_inflation(pick):
    price, rate = pick.amount([20, 40, 50, 80, 100, 200, 300, 400, 500, 1000]), pick.amount([2, 3, 4, 5, 6, 8, 10])
    return (
        f"A basket of goods costs {money(price)} today. What will it cost in a year if inflation is {rate} percent?",
        "",
        f"Price = {number(price)} x {plain(1 + rate / 100)} = {result(price * (1 + rate / 100))}. "
        f"The basket will cost {money(price * (1 + rate / 100))}.",
    )


def inflation_from_index(pick):
    before, rate = pick.amount([100, 120, 150, 160, 200, 250]), pick.amount([2, 4, 5, 6, 8, 10])
    after = before * (1 + rate / 100)
    return (
        f"A price index rises from {plain(before)} to {plain(after)} in one year. What is the rate of inflation?",
        "",
        f"Rise = {plain(after)} - {plain(before)} = {plain(after - before)}. "
        f"Inflation = {plain(after - before)} / {plain(before)} x 100 = {plain(rate)}. The rate of inflation is {plain(rate)} percent.",
    )


def real_interest_rate(pick):
    nominal, inflation = pick.amount([4, 5, 6, 7, 8, 9, 10]), pick.amount([1, 2, 3])
    return (
        f"A bond pays {nominal} percent a year while inflation is {inflation} percent. What is the real interest rate, approximately?",
        "",
        f"Real rate = {nominal} - {inflation} = {nominal - inflation}. The real interest rate is about {nominal - inflation} percent.",
    )


def currency_conversion(pick):
    dollars, rate = pick.amount([50, 100, 200, 300, 400, 500, 800, 1000]), pick.amount(["0.8", "0.9", "1.2", "1.5", "4", "20"])
    return (
        f"One dollar buys {rate} units of a foreign currency. How many units does a traveler get for {money(dollars)}?",
        "",
        f"Units = {number(dollars)} x {rate} = {result(dollars * rate)}. The traveler gets {number(dollars * rate)} units.",
    )


def currency_into_dollars(pick):
    dollars, rate = pick.amount([20, 30, 50, 60, 80, 100]), pick.amount([4, 5, 8, 20, 40])
    return (
        f"A foreign hotel charges {number(dollars * rate)} crowns a night. With {rate} crowns to the dollar, what is that in dollars?",
        "",
        f"Dollars = {number(dollars * rate)} / {rate} = {result(dollars)}. The hotel charges {money(dollars)} a night.",
    )


# ---- securities ------------------------------------------------------------------------------------------------------


def bond_interest(pick):
    face, coupon, years = pick.amount([1000, 2000, 5000, 10000]), pick.amount([2, 3, 4, 5, 6]), pick.amount([2, 3, 5, 10])
    yearly = face * coupon / 100
    return (
        f"A bond with a face value of {money(face)} pays a coupon of {coupon} percent a year. "
        f"How much interest does it pay in {years} years?",
        "",
        f"Yearly interest = {number(face)} x {plain(coupon / 100)} = {result(yearly)}. "
        f"Total = {number(yearly)} x {years} = {result(yearly * years)}. The bond pays {money(yearly * years)}.",
    )


def current_yield(pick):
    price, rate = pick.amount([500, 800, 900, 1000, 1200, 1250]), pick.amount([2, 3, 4, 5, 6, 8])
    return (
        f"A bond pays {money(price * rate / 100)} a year and its price is {money(price)}. What is its current yield?",
        "",
        share("Current yield", price * rate / 100, price, "The current yield is"),
    )


def bill_return(pick):
    price, face = pick(((950, 1000), (980, 1000), (960, 1000), (4900, 5000), (9800, 10000), (9500, 10000), (9600, 10000), (1900, 2000)))
    gain = Decimal(face - price)
    return (
        f"The government sells a bill for {money(price)} and repays {money(face)} one year later. What return does the buyer make?",
        "",
        f"Discount = {number(face)} - {number(price)} = {result(gain)}. " + share("Earned", gain, price, "The buyer earns"),
    )


def dividend_yield(pick):
    price, rate = pick.amount([20, 25, 40, 50, 80, 100, 200]), pick.amount([2, 3, 4, 5, 6])
    return (
        f"A stock costs {money(price)} and pays a yearly dividend of {money(price * rate / 100)}. What is its dividend yield?",
        "",
        share("Dividend yield", price * rate / 100, price, "The dividend yield is"),
    )


def capital_gain(pick):
    shares, bought, gain = pick.amount([5, 10, 20, 50, 100]), pick.amount(TENS), pick.amount([2, 3, 5, 8, 10, 15])
    return (
        f"An investor buys {shares} shares at {money(bought)} each and sells them at {money(bought + gain)} each. "
        "What is the capital gain?",
        "",
        f"Gain for each share = {number(bought + gain)} - {number(bought)} = {result(gain)}. "
        f"Total = {shares} x {number(gain)} = {result(shares * gain)}. The capital gain is {money(shares * gain)}.",
    )


def total_return(pick):
    bought, rate, dividend = pick.amount([20, 40, 50, 80, 100, 200]), pick.amount([5, 10, 15, 20]), pick.amount([1, 2, 4])
    sold = bought + bought * rate / 100
    earned = sold - bought + dividend
    return (
        "What is the total return on this stock, as a percentage of its cost?",
        f"Bought at {money(bought)}. Sold after a year at {money(sold)}. Dividend: {money(dividend)}.",
        f"Gain = {number(sold)} - {number(bought)} + {dividend} = {result(earned)}. "
        + share("Return", earned, bought, "The total return is"),
    )


def market_capitalization(pick):
    price, shares = pick.amount(TENS), pick.amount([2, 3, 4, 5, 10, 20])
    return (
        f"A company has {shares} million shares, and each share costs {money(price)}. What is its market capitalization?",
        "",
        f"Value = {shares} x {price} = {result(shares * price)}. The market capitalization is {money(shares * price)} million.",
    )


def earnings_per_share(pick):
    earnings, shares = pick.amount([1, 2, 3, 4, 5, 6]), pick.amount([2, 4, 5, 10, 20])
    return (
        f"A company earns {money(earnings * shares)} million and has {shares} million shares. What are its earnings per share?",
        "",
        f"Earnings per share = {number(earnings * shares)} / {shares} = {result(earnings)}. The earnings per share are {money(earnings)}.",
    )


def price_earnings(pick):
    earnings, ratio = pick.amount([2, 3, 4, 5]), pick.amount([8, 10, 12, 15, 20, 25])
    return (
        f"Find the price-earnings ratio when one share trades at {money(earnings * ratio)} and earned {money(earnings)} last year.",
        "",
        f"Ratio = {number(earnings * ratio)} / {earnings} = {result(ratio)}. The price-earnings ratio is {ratio}.",
    )


def stock_split(pick):
    shares, price, parts = pick.amount([10, 20, 30, 50, 100]), pick.amount([60, 90, 120, 180, 240]), pick.amount([2, 3])
    return (
        f"An owner of {shares} shares at {money(price)} sees each share split into {parts}. How many shares are held, and at what price?",
        "",
        f"Shares = {shares} x {parts} = {result(shares * parts)}. Price = {number(price)} / {parts} = {result(price / parts)}. "
        f"The owner holds {number(shares * parts)} shares at {money(price / parts)}.",
    )


def call_option(pick):
    strike, above, premium = pick.amount([20, 30, 40, 50, 100]), pick.amount([6, 8, 10, 12]), pick.amount([1, 2, 3, 4])
    return (
        f"A call option with a strike price of {money(strike)} was bought for {money(premium)}. "
        f"At expiration the stock is at {money(strike + above)}. What is the profit on each share?",
        "",
        f"Profit = {number(strike + above)} - {number(strike)} - {premium} = {result(above - premium)}. "
        f"The profit is {money(above - premium)} a share.",
    )


def put_option(pick):
    strike, below, premium = pick.amount([30, 40, 50, 60, 100]), pick.amount([6, 8, 10, 12]), pick.amount([1, 2, 3, 4])
    return (
        f"{pick(NAMES)} paid {money(premium)} for the right to sell a share at {money(strike)}. "
        f"The share now costs {money(strike - below)}. How much is gained in all by using the right?",
        "",
        f"The right is worth: {number(strike)} - {number(strike - below)} = {result(below)}. "
        f"Less its price: {below} - {premium} = {result(below - premium)}. The gain is {money(below - premium)} a share.",
    )


def fund_fee(pick):
    invested, rate = pick.amount([1000, 2000, 4000, 5000, 10000, 20000, 50000]), pick.amount(["0.1", "0.2", "0.5", "1", "1.5", "2"])
    return (
        f"A fund charges {rate} percent a year. What does it cost to hold {money(invested)} in it for one year?",
        "",
        f"Fee = {number(invested)} x {plain(rate / 100)} = {result(invested * rate / 100)}. The fee is {money(invested * rate / 100)}.",
    )


def portfolio_weight(pick):
    total, rate = pick.amount([1000, 2000, 4000, 5000, 10000, 20000]), pick.amount([20, 25, 30, 40, 60, 70, 75, 80])
    stocks = total * rate / 100
    return (
        "What percentage of the portfolio is in stocks?",
        f"Stocks: {money(stocks)}. Bonds: {money(total - stocks)}.",
        f"Total = {number(stocks)} + {number(total - stocks)} = {result(total)}. "
        + share("Stocks", stocks, total, "The part in stocks is"),
    )


def portfolio_return(pick):
    stocks, high, low = pick.amount([20, 40, 50, 60, 80]), pick.amount([6, 8, 10, 12]), pick.amount([2, 3, 4, 5])
    first, second = stocks / 100 * high, (100 - stocks) / 100 * low
    return (
        "What is the return of the whole portfolio?",
        f"{stocks} percent is in stocks that earned {high} percent, and {100 - stocks} percent is in bonds that earned {low} percent.",
        f"Return = {plain(stocks / 100)} x {high} + {plain((100 - stocks) / 100)} x {low} = {plain(first + second)}. "
        f"The return of the portfolio is {plain(first + second)} percent.",
    )


# ---- accounts of a company -------------------------------------------------------------------------------------------


def break_even(pick):
    price, cost, units = pick.amount([10, 15, 20, 25, 30, 50]), pick.amount([2, 4, 5, 6, 8]), pick.amount([50, 100, 200, 300, 400, 500])
    fixed = (price - cost) * units
    return (
        f"Fixed costs are {money(fixed)}. Each unit sells for {money(price)} and has a variable cost of {money(cost)}. "
        "How many units must be sold to break even?",
        "",
        f"Margin for each unit = {price} - {cost} = {price - cost}. Units = {number(fixed)} / {price - cost} = {result(units)}. "
        f"The firm must sell {units} units.",
    )


def gross_margin(pick):
    revenue, rate = pick.amount([500, 800, 1000, 2000, 4000, 5000]), pick.amount([20, 25, 30, 40, 50, 60])
    cost = revenue - revenue * rate / 100
    return (
        f"A store has sales of {money(revenue)}, and the goods it sold cost {money(cost)}. What is the gross margin in percent?",
        "",
        f"Gross profit = {number(revenue)} - {number(cost)} = {result(revenue - cost)}. "
        + share("Gross margin", revenue - cost, revenue, "The gross margin is"),
    )


def net_margin(pick):
    revenue, rate = pick.amount([200, 300, 400, 500, 800]), pick.amount([4, 5, 8, 10, 12, 15])
    return (
        "Express the net income as a percentage of revenue.",
        f"Revenue: {money(revenue)} million. Net income: {money(revenue * rate / 100)} million.",
        share("Net margin", revenue * rate / 100, revenue, "The net margin is"),
    )


def net_income(pick):
    revenue = pick.amount([50000, 60000, 80000, 90000, 100000])
    wages, rent, other = pick.amount([20000, 25000, 30000]), pick.amount([5000, 8000, 10000]), pick.amount([2000, 3000, 4000])
    income = revenue - wages - rent - other
    return (
        "What is the net income of the business?",
        f"Revenue: {money(revenue)}. Wages: {money(wages)}. Rent: {money(rent)}. Other expenses: {money(other)}.",
        f"Net income = {number(revenue)} - {number(wages)} - {number(rent)} - {number(other)} = {result(income)}. "
        f"The net income is {money(income)}.",
    )


def owners_equity(pick):
    assets, debts = pick.amount([50000, 80000, 100000, 120000, 150000, 200000]), pick.amount([10000, 20000, 25000, 30000, 40000])
    return (
        f"A firm has assets of {money(assets)} and liabilities of {money(debts)}. What is the equity of its owners?",
        "",
        f"Equity = {number(assets)} - {number(debts)} = {result(assets - debts)}. The equity is {money(assets - debts)}.",
    )


def current_ratio(pick):
    debts, ratio = pick.amount([1000, 2000, 4000, 5000, 10000, 20000]), pick.amount(["0.5", "1.2", "1.5", "2", "2.5", "3"])
    return (
        f"Current assets are {money(debts * ratio)} and current liabilities are {money(debts)}. What is the current ratio?",
        "",
        f"Current ratio = {number(debts * ratio)} / {number(debts)} = {plain(ratio)}. The current ratio is {plain(ratio)}.",
    )


def debt_to_equity(pick):
    equity, ratio = pick.amount([10000, 20000, 40000, 50000, 100000]), pick.amount(["0.5", "0.8", "1.2", "1.5", "2"])
    return (
        f"A company has debts of {money(equity * ratio)} and equity of {money(equity)}. What is its debt-to-equity ratio?",
        "",
        f"Ratio = {number(equity * ratio)} / {number(equity)} = {plain(ratio)}. The debt-to-equity ratio is {plain(ratio)}.",
    )


def return_on_equity(pick):
    equity, rate = pick.amount([10000, 20000, 40000, 50000, 100000, 200000]), pick.amount([5, 8, 10, 12, 15, 20])
    return (
        f"A company earns {money(equity * rate / 100)} on equity of {money(equity)}. What is its return on equity?",
        "",
        share("Return on equity", equity * rate / 100, equity, "The return on equity is"),
    )


def depreciation(pick):
    yearly, years, salvage = pick.amount([200, 500, 800, 1000, 2000, 3000]), pick.amount([4, 5, 8, 10]), pick.amount([500, 1000, 2000])
    cost = yearly * years + salvage
    return (
        f"A machine costs {money(cost)}, lasts {years} years, and can then be sold for {money(salvage)}. "
        "What is the yearly straight-line depreciation?",
        "",
        f"Depreciation = ({number(cost)} - {number(salvage)}) / {years} = {result(yearly)}. The yearly depreciation is {money(yearly)}.",
    )


def payback_period(pick):
    yearly, years = pick.amount([500, 800, 1000, 2000, 3000, 5000]), pick.amount([3, 4, 5, 6, 8])
    return (
        f"New equipment costs {money(yearly * years)} and saves the firm {money(yearly)} a year. "
        "After how many years is its cost recovered?",
        "",
        f"Payback period = {number(yearly * years)} / {number(yearly)} = {result(years)}. The cost is recovered after {years} years.",
    )


# ---- the economy -----------------------------------------------------------------------------------------------------


def gdp(pick):
    parts = [pick.amount(options) for options in ([500, 600, 700], [100, 150, 200], [150, 200, 250], [80, 100, 120], [90, 110, 130])]
    consumption, investment, government, exports, imports = parts
    total = consumption + investment + government + exports - imports
    return (
        "What is the gross domestic product, in billions of dollars?",
        f"Consumption: {consumption}. Investment: {investment}. Government purchases: {government}. "
        f"Exports: {exports}. Imports: {imports}.",
        f"GDP = {consumption} + {investment} + {government} + {exports} - {imports} = {result(total)}. "
        f"The gross domestic product is {money(total)} billion.",
    )


def unemployment_rate(pick):
    force, rate = pick.amount([50, 100, 150, 200]), pick.amount([3, 4, 5, 6, 8, 10])
    unemployed = force * rate / 100
    return (
        f"In a country, {plain(force - unemployed)} million people are employed and {plain(unemployed)} million are unemployed. "
        "What is the unemployment rate?",
        "",
        f"Labor force = {plain(force - unemployed)} + {plain(unemployed)} = {plain(force)}. "
        f"Rate = {plain(unemployed)} / {plain(force)} x 100 = {plain(rate)}. The unemployment rate is {plain(rate)} percent.",
    )


def trade_balance(pick):
    exports, imports = pick.amount([200, 220, 240, 250, 300]), pick.amount([210, 230, 260, 280, 320])
    difference = exports - imports
    return (
        f"A country exports goods worth {money(exports)} billion and imports goods worth {money(imports)} billion. "
        "Does it have a trade surplus or a trade deficit, and how large is it?",
        "",
        (
            f"Surplus = {exports} - {imports} = {result(difference)}. It has a trade surplus of {money(difference)} billion."
            if difference > 0
            else f"Deficit = {imports} - {exports} = {result(-difference)}. It has a trade deficit of {money(-difference)} billion."
        ),
    )


def bank_reserves(pick):
    deposits, rate = pick.amount([200, 400, 500, 800, 1000, 2000]), pick.amount([5, 10, 15, 20, 25])
    kept = deposits * rate / 100
    return (
        f"A bank holds deposits of {money(deposits)} million and keeps {rate} percent of them as reserves. "
        "It lends the rest. How much is that?",
        "",
        f"Reserves = {number(deposits)} x {plain(rate / 100)} = {result(kept)}. Loans = {number(deposits)} - {number(kept)} = "
        f"{result(deposits - kept)}. The bank lends {money(deposits - kept)} million.",
    )


TRAIN = [
    simple_interest, loan_repaid_at_once, compound_two_years, present_value_one_year, net_present_value, rule_of_72,
    loan_payment, payment_per_thousand, interest_of_first_month, total_interest_paid, down_payment, debt_to_income,
    budget_left_over, net_worth, months_to_save, net_pay, employer_match, insurance_claim,
    sales_tax, price_after_discount, income_tax_with_deduction, tax_brackets, price_after_inflation, inflation_from_index,
    real_interest_rate, currency_conversion,
    bond_interest, current_yield, dividend_yield, capital_gain, total_return, market_capitalization, earnings_per_share, stock_split,
    call_option, fund_fee, portfolio_weight, portfolio_return,
    break_even, gross_margin, net_income, owners_equity, current_ratio, debt_to_equity, return_on_equity, depreciation,
    gdp, unemployment_rate, trade_balance, bank_reserves,
]
HELD_OUT = [
    simple_interest_months, present_value_two_years, loan_to_value, card_utilization, medical_bill, currency_into_dollars,
    bill_return, price_earnings, put_option, net_margin, payback_period,
]


def records():
    """Every computed record, in order; a template that repeats a question picks again."""
    for split, templates in (("train", TRAIN), ("held_out", HELD_OUT)):
        for template in templates:
            pick, seen = Pick(template.__name__), set()
            while len(seen) < RECORDS:
                instruction, given, output = template(pick)
                if (instruction, given) in seen:
                    continue
                seen.add((instruction, given))
                yield {
                    "instruction": instruction, "input": given, "output": output,
                    "kind": "computed", "template": template.__name__, "split": split,
                }


def lines() -> list[str]:
    return [json.dumps(record) for record in records()]


def main():
    parser = argparse.ArgumentParser(description="Make the computed records of finance.jsonl.")
    parser.add_argument("--write", action="store_true", help="replace the computed records in finance.jsonl")
    if parser.parse_args().write:
        kept = [line for line in DATA.read_text(encoding="ascii").splitlines() if json.loads(line)["kind"] == "explained"]
        DATA.write_text("\n".join(kept + lines()) + "\n", encoding="ascii")
        print(f"{DATA.name}: {len(kept)} explained records kept, {len(lines())} computed ones written")
    else:
        print("\n".join(lines()))


if __name__ == "__main__":
    main()
