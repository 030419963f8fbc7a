"""Extraction and math: what counts as an answer, and which answers are equal."""

import json
import re
import time
from pathlib import Path
from random import Random

import pytest
from test_sandbox import children

import verify
from shelf import answers

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data"


@pytest.fixture(scope="module")
def graders():
    with verify.Graders(workers=2, timeout=20) as pool:
        yield pool


def grade(graders, answer, gold, **options):
    return graders.submit("math", f"So \\boxed{{{answer}}}.", gold, **options).result()


# ---- extraction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}.", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{5} then \boxed{6}", "6"),
        (r"\boxed{5} then \fbox{6}", "6"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{1 \\ 2}", r"1 \\ 2"),
        ("\\boxed{\n5\n}", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{ \boxed{5}", "5"),
        (r"let { be open, \boxed{5}", "5"),
        (r"} } \boxed{5} }", "5"),
        (r"\\boxed{5}", "5"),
        ("Answer: 5", "5"),
        ("answer: 5", "5"),
        ("text\n**Answer:** 5", "5"),
        ("**Answer**: 5\nbye", "5"),
        ("### Final Answer: 5", "5"),
        ("The final answer: 5", "5"),
        ("> Answer:5", "5"),
        ("Answer: 5\nAnswer: 6", "6"),
        ("\\boxed{5}\nAnswer: 6", "6"),
        ("Answer: 6\n\\boxed{5}", "5"),
        (r"Answer: \boxed{5}", "5"),
        (r"Answer: $\boxed{5}$", "5"),
        ("\\boxed{5}\nAnswer:", "5"),
        ("\\boxed{5}\nAnswer: \\boxed{6", "5"),
        ("\\boxed{5}\nAnswer: $LETTER", "5"),
        (r"<think>\boxed{4}</think>\boxed{5}", "5"),
        (r"a</think>\boxed{4}</think>\boxed{5}", "5"),
        (r"\boxed{5</think>}", None),
        (r"<think>\boxed{5}", None),
        (r"<think>\boxed{4}</think><think>\boxed{5}", None),
        ("<think>\nAnswer: 5", None),
        (r"\boxed{4}</think> nothing", None),
        ("Answer: 4</think> nothing", None),
        ("the last number is 5", None),
        ("The answer is 5", None),
        ("My Wrong Answer: 5", None),
        ("do not write Answer: 5", None),
        (r"\boxed{5", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{5\}", None),
        (r"\boxed 5", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxedx{5}", None),
        (r"\framebox{5}", None),
        (r"Answer: \boxed{5", None),
        ("\x08oxed{5}", None),
        ("Answer:", None),
        ("", None),
        (None, None),
    ],
)
def test_extract(text, answer):
    assert verify.extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "\\boxed{" * 20_000 + "5}",
        "{" * 200_000,
        "}" * 200_000,
        "\\" * 200_000,
        "\\boxed" + " " * 200_000,
        "\\boxed " * 25_000,
        "Answer: " * 25_000,
        "Answer:\n" * 25_000,
        "answer" + " *" * 100_000,
        "#" * 200_000,
        " \t" * 100_000 + "x",
        "Answer: " + "*" * 200_000,
        "Answer: " + "( " * 100_000 + "LETTER",
        "</think>" * 25_000,
        "</think" * 25_000,
        "\\boxed{" + "a" * 200_000 + "}",
        "\\boxed{" + "9" * 200_000 + "}",
        "\\boxed{" + "^{" * 5000 + "}" * 5000 + "}",
        "\\boxed{" + " " * 1900 + "x}",
        "\\boxed{x" + " " * 1900 + "x}",
        "\\boxed{x" + "\\, " * 600 + "x}",
        "\\boxed{" + "1 hour " * 280 + "x}",
        "\\boxed{" + "½" * 1900 + "x}",
        "\\boxed{" + "1," * 900 + "1}",
        "\\boxed{" + "-" * 1900 + "}",
        "\\boxed{" + "((" * 900 + "}",
        "\\boxed{" + "\\text{" * 250 + "}" * 250 + "}",
        "```\n" * 50_000,
        "`" * 200_000,
        ("```" + " " * 1000 + "x\n") * 190,
    ],
)
def test_long_texts_take_linear_time(graders, text):
    started = time.process_time()  # of this process: not what a worker does
    verify.extract_answer(text)
    verify.extract_code(text)
    futures = [graders.submit("math", text, "7"), graders.submit("choice", text, "A")]
    assert not any(future.result().correct for future in futures)
    assert time.process_time() - started < 2


# ---- equal and different ------------------------------------------------------------------------

# gold => answer
EQUAL = r"""
30 => 30^\circ
30^\circ => 30
30^{\circ} => 30 \text{ degrees}
30 => 30°
10080 => 10,\!080
10080 => 10{,}080
10080 => 10\,080
1234567 => 1\,234\,567
320000 => 3.2e5
320000 => 3.2 \times 10^5
3.2 \times 10^{5} => 320,000
0.00032 => 3.2e-4
\frac{1}{3} => 0.\overline{3}
0.\overline{3} => \frac13
\frac{41}{99} => 0.\overline{41}
\frac{1}{6} => 0.1\overline{6}
\emptyset => \varnothing
\varnothing => \{\}
0 \le x \le 1 => 1 \ge x \ge 0
1 \ge x > 0 => 0 < x \leq 1
5 => 5.
5 => \text{5}
5 => 5.0
0.5 => .5
\frac12 => 0.5
\frac{1}{2} => 1/2
\frac{1}{2} => \dfrac{1}{2}
\frac{1}{2} => \tfrac12
50\% => 50
50\% => 0.5
0.5 => 50\%
50 => 50\%
50\% => \frac{1}{2}
50\% => 50 \text{ percent}
1,000 => 1000
1000 => 1,000
7 => 007
5 => x=5
x=5 => 5
x=5 => x = 5
5 => x = 2+3 = 5
1\frac{4}{5} => 1.8
1 \frac{4}{5} => \frac{9}{5}
137 \frac{1}{2} => 137.5
-1\frac12 => -1.5
(3,4] => (3, 4]
\left( 3, \frac{\pi}{2} \right) => (3, \pi/2)
(2,12) \cup (12,102) => (12,102)\cup(2,12)
1,-2 => -2, 1
3,5,7 => 7,3,5
\{1,2,3\} => \{3,2,1\}
1 \pm \sqrt{19} => 1+\sqrt{19}, 1-\sqrt{19}
1 \pm \sqrt{19} => 1\pm\sqrt{19}
x \in [-2,7] => [-2,7]
[-2,7] => -2 \le x \le 7
(5,\infty) => x > 5
y = 2x+3 => y=3+2x
y = 2x+3 => 2x+3
5x - 7y + 11z + 4 = 0 => -5x+7y-11z-4=0
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} => \begin{pmatrix}-\frac13\\\frac23\end{pmatrix}
\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix} => \begin{bmatrix}1&0\\0&1\end{bmatrix}
\text{Evelyn} => Evelyn
Evelyn => \text{evelyn}
\text{(C)} => C
\text{(C)} => (C)
C => \text{C}
52_8 => 52_{8}
864 \mbox{ inches}^2 => 864
864 => 864 \text{ inches}^2
5.4 \text{ cents} => 5.4
15\mbox{ cm}^2 => 15 \text{ cm}^2
15 => 15 cm
\$32,\!348 => 32348
\$18.90 => 18.9
18.90 => \$18.90
p - q => -q+p
2k => 2k
6+9i => 9i+6
\frac{11+9a}{20} => \frac{9a+11}{20}
\sqrt{51} => 51^{1/2}
11\sqrt2 => 11\sqrt{2}
\cot x => \cot(x)
x^2-1 => (x-1)(x+1)
2^{10} => 1024
\frac{\sqrt{3}}{3} => \frac{1}{\sqrt{3}}
-\frac{35}{9} => \frac{-35}{9}
12\pi => 12 \cdot \pi
\frac{3}{4} => \frac{6}{8}
100! => 100!
n! => n!
25 => m+n = 25
f(x) = 2x => 2x
5 => \mathbf{5}
5 => \boxed{5}
5 => $5$
5 => \(5\)
5 => {5}
\text{no solution} => \text{No solution}
+5 => 5
5 => +5
-5 => −5
\pi => π
\infty => \infty
(-\infty, 0] => (-\infty,0]
e^2 => e^{2}
\log_2 3 => \log_2(3)
3\sqrt{13} => \sqrt{117}
1,2 => 1 \text{ and } 2
1,2 => x=1 \text{ or } x=2
1,2 => 1 or 2
90^\circ => 90^{\circ}
\frac{270}7\text{ degrees} => \frac{270}{7}^\circ
0 => 0.0
-0 => 0
\frac{20000}{\pi} => 20000/\pi
x^3+3x-6 => x^3 + 3x - 6
10^{-7} => 0.0000001
5:3 => 5:3
\frac{1}{3} => 0.33333333
12:30 => 12:30
3 \times 10^8 => 300000000
2x => x \cdot 2
\overline{AB} => \overline{AB}
\angle ABC => \angle ABC
\lfloor x \rfloor => \lfloor x \rfloor
\binom{10}{3} => 120
\frac{\pi}{6} => \pi/6
A \cup B => B \cup A
x>5 => 5<x
x \neq 3 => x \ne 3
\mathbb{R} => \mathbb{R}
(1,2),(3,4) => (3,4),(1,2)
1{,}000{,}000 => 1000000
\text{Monday} => Monday
12 \text{ hours} => 12
\frac{7}{2} \text{ units} => 3.5
15 => 8+7 = 15
15 => 15\,\text{ways}
15 => (15)
15 => 15 \times 10^0
15 => 1.5\times 10^{1}
1000 => 1e3
10^{-3} => 0.001
\frac{3}{2} => 1.5
\frac{3}{2} => 1 \frac{1}{2}
\frac{3}{2} => \frac{6}{4}
-\frac{1}{2} => \frac{1}{-2}
-\frac{1}{2} => -\frac{-1}{-2}
\frac{1}{2} => \frac{-1}{-2}
x > 2 => x > 2.0
3\sqrt2 => \sqrt{18}
3\sqrt2 => 2\sqrt2+\sqrt2
2^{100} => 2^{99} \cdot 2
10! => 10!
10! => 3628800
\binom{5}{2} => \binom{5}{3}
\frac{\pi}{4} => \frac{\pi}{4} \text{ radians}
x^2+1 => x^2+1+0
\frac{1}{3} => 0.3333333
1:3 => 3:9
12:30 => 12:30 \text{ PM}
\frac{dy}{dx} => \frac{dy}{dx}
\{\emptyset\} => \{\emptyset\}
p=4, q=9 => q=9, p=4
p=4, q=9 => 4, 9
0.005 => 0.5\%
5 => 500\%
(-\infty,1)\cup(3,\infty) => x<1 \text{ or } x>3
x<1 \text{ or } x>3 => (-\infty,1)\cup(3,\infty)
(1,2) => \{x : 1 < x < 2\}
(1,2) => \{x \in \mathbb{R} \mid 1 < x < 2\}
(1,2) => ]1,2[
[1,2) => [1,2[
\mathbb{R} => \text{all real numbers}
(-\infty, \infty) => \mathbb{R}
\mathbb{R}\setminus\{0\} => (-\infty,0)\cup(0,\infty)
\mathbb{R}\setminus\{0\} => x \ne 0
\text{all real numbers except } 0 => \mathbb{R}\setminus\{0\}
x \neq 1, x \neq 2 => \mathbb{R} \setminus \{1,2\}
12345 => 12 345
\frac12 => ½
x^2 => x²
1+i => 1+\mathrm{i}
\frac{1}{2}+\frac{\sqrt3}{2}i => e^{i\pi/3}
e^{i\pi/3} => \cos\frac{\pi}{3}+i\sin\frac{\pi}{3}
52_8 => 52 \text{ base } 8
52_8 => 52_{\text{eight}}
52_8 => 52_{\text{base }8}
\text{no solution} => no solution
July 4 => 4 July
July 4 => July 4th
\text{I and III} => \text{I, III only}
\log_2 3 => \log_{2}{3}
\frac{\sqrt3}{2} => \sin 60^\circ
\frac{\sqrt3}{2} => \sin \frac{\pi}{3}
\frac{\pi}{4}+k\pi => \frac{\pi}{4}+k\pi, k \in \mathbb{Z}
\frac{\pi}{4}+k\pi, k \in \mathbb{Z} => \frac{\pi}{4}+n\pi
\frac{\pi}{4}+k\pi, k \in \mathbb{Z} => \frac{5\pi}{4}+n\pi, n \in \mathbb{Z}
x \equiv 3 \pmod 7 => 3 \bmod 7
x \equiv 3 \pmod 7 => x = 7k+3, k \in \mathbb{Z}
2x+3 => f(x) = 2x+3
2x+3 => y = 2x+3
y = 2x+3 => f(x) = 2x+3
(B) => B
12 => \textbf{(B) } 12
B => \text{(B) } 12
60 \text{ kph} => 60 \text{ kilometers per hour}
5 \text{ in}^2 => 5 \text{ square inches}
1.25 \text{ hours} => 1 \text{ hour } 15 \text{ minutes}
5 \text{ s}^{-1} => 5 \text{ per second}
5 => 5 \text{ cm}^2
x => x + y - y
x+1 => (x+1)^1
x+1 => \frac{x^2-1}{x-1}
5 => 5. \overline{0}
5 => 4.\overline{9}
1 => 0.\overline{9}
-3 => -\!3
-3 => (-3)
-3 => - 3
-3 => \text{-3}
3, 4 => 3 \text{ and } 4
3, 4 => 4 \text{ or } 3
\{3, 4\} => 3, 4
\begin{pmatrix} 1 \\ 2 \end{pmatrix} => \begin{bmatrix} 1 \\[4pt] 2 \end{bmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} => \left(\begin{array}{c} 1 \\ 2 \end{array}\right)
\begin{cases} x=1 \\ y=2 \end{cases} => x=1, y=2
x=1, y=2 => (1, 2)
x > \sqrt{3} => x > \frac{\sqrt{12}}{2}
xy => y \cdot x
\mathbb{R} => x<3 \text{ or } x>1
(1,2) => x=1, y=2
\text{Thursday} => Thursday
18 \text{ m/s} => 18 \text{ m s}^{-1}
2\pi \text{ cm} => 2\pi
2\pi => 2\pi \text{ cm}
x \in (0, 1) => 0 < x < 1
n = 3 => 3
x = 3, -3 => \pm 3
\pm 3 => 3, -3
2 \pm \sqrt{3} => 2+\sqrt3, 2-\sqrt3
\frac{-1 \pm \sqrt{5}}{2} => \frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2}
\frac{1}{2}x => x/2
\frac{1}{2}x => 1/2 x
\frac{2}{3}\pi => 2/3\pi
y=\frac{1}{2}x+1 => x-2y+2=0
y=\frac{1}{2}x+1 => 2y=x+2
x^2+y^2=4 => x^2+y^2-4=0
1,2,3 => 1, 2, \text{ and } 3
\pi => \pi \approx 3.14
\sqrt2 => \sqrt{2} = 1.41
\sqrt2 => 1.41421356
4 => \text{4}
4 => 4,
4 => 4;
15 => \hspace{1cm}15
15 => 15\hspace{2pt}\text{cm}
15 => x \in \{15\}
15 => 1.5 \cdot 10^{1}
15 => 150 \times 10^{-1}
15 => 0015
15 => 15.000
123456 => 1,23,456
1234567 => 1.234.567
1234567 => 1'234'567
\frac{3}{4} => 3/4
\frac{3}{4} => \frac34
\frac{3}{4} => .75
\frac{3}{4} => 75\%
-\frac{3}{4} => \frac{3}{-4}
0.1\overline{6} => \frac{1}{6}
\frac{14}{3} => 4\frac{2}{3}
\frac{14}{3} => 4 \tfrac{2}{3}
\frac{14}{3} => 4.\overline{6}
\frac{14}{3} => 4.666667
p - q => -(q-p)
3\sqrt{13} => 3 \sqrt {13}
3\sqrt{13} => \sqrt{9\cdot13}
3\sqrt{13} => 3\cdot\sqrt{13}
3\sqrt{13} => 3√13
6 - 5i => -5i+6
11\sqrt2 => 11 \cdot 2^{1/2}
70 \sqrt{2} => 70\sqrt{2} \text{ feet}
-\frac{\pi}{6} => -\pi/6
-\frac{\pi}{6} => \frac{-\pi}{6}
\frac{3\sqrt{3}}{4} => \frac34\sqrt3
\cot x => \frac{1}{\tan x}
\cot x => \frac{\cos x}{\sin x}
\cot x => \cot{x}
1 \pm \sqrt{19} => 1+\sqrt{19} \text{ and } 1-\sqrt{19}
1 \pm \sqrt{19} => x = 1 \pm \sqrt{19}
\text{east} => East
\text{east} => \textbf{East}
(a+5)(b+2) => ab+2a+5b+10
(a+5)(b+2) => (b+2)(a+5)
(3,4] => 3 < x \le 4
\text{even} => even
4210_{5} => 4210_5
(2,\infty) => x>2
(2,\infty) => (2, +\infty)
(-\infty, 0] => x \leq 0
864 \mbox{ inches}^2 => 864 \text{ in}^2
864 \mbox{ inches}^2 => 6 \text{ ft}^2
864 \mbox{ inches}^2 => 864 \text{ square inches}
5.4 \text{ cents} => 5.4¢
\text{(C)} => \textbf{(C)}
\text{ellipse} => ellipse
\text{ellipse} => an ellipse
\left[ \frac{\pi^2}{8}, \frac{5 \pi^2}{4} \right] => [\pi^2/8, 5\pi^2/4]
\{1\pm\sqrt{5},-2\} => -2, 1+\sqrt{5}, 1-\sqrt{5}
6r^2-4r-24 => 2(3r^2-2r-12)
8n^2 + 4n + 1 => (2n)^2 \cdot 2+4n+1
y = 2x + 3 => 2x - y + 3 = 0
y = -2x => y=-2x
y = -2x => -2x
y = 2x + 3 => y - 3 = 2x
15\mbox{ cm}^2 => 15 \text{ square centimeters}
18+2\pi => 2\pi + 18
18+2\pi => 2(\pi+9)
18+2\pi => 24.283185
\frac{11+9a}{20} => \frac{11}{20}+\frac{9a}{20}
\frac{20000}{\pi} => \frac{2 \cdot 10^4}{\pi}
x^8 + x^7 => x^7(x+1)
\sin^2 x => 1-\cos^2 x
\frac{1}{2}\ln 2 => \ln\sqrt2
\frac{1}{2}\ln 2 => \frac{\ln 2}{2}
2^{n}-1 => 2^n - 1
2^n => 2^{n-1}\cdot 2
\binom{n}{2} => \frac{n(n-1)}{2}
\lfloor n/2 \rfloor => \lfloor \frac{n}{2} \rfloor
e^{2x} => (e^x)^2
e^{2x} => \exp(2x)
\log_2 5 => \frac{\ln 5}{\ln 2}
\log 2 => \log_{10} 2
a^2+b^2 => a^2 + b^2 + c - c
x => 1x
2x => x+x
\sqrt{3} => 3^{0.5}
\sqrt{3} => \frac{3}{\sqrt3}
\sqrt{3} => \tan 60^\circ
\sqrt{3} => |-\sqrt3|
\pi => 3.14159265
10:30 => 10:30 \text{ a.m.}
10:30 \text{ a.m.} => 10:30 AM
2:3 => 4:6
2:3 => 2 : 3
\$12.50 => \$12.5
\$12.50 => 12.50
\$12.50 => 1250 \text{ cents}
25 \text{ mph} => 25 \text{ miles per hour}
30 \text{ minutes} => \frac12 \text{ hour}
7 \text{ days} => 1 \text{ week}
x=2 \text{ or } x=-2 => x = \pm 2
(x-1)^2+(y-2)^2=9 => x^2-2x+y^2-4y-4=0
x<0 \text{ or } x>1 => (-\infty, 0) \cup (1, \infty)
a=1, b=2 => (a,b) = (1,2)
(1,2) => (x,y) = (1,2)
(1,2) => x=1,\ y=2
\text{Yes} => yes
"""

DIFFERENT = r"""
5 => 5 \text{ or } 6
5 => 5, 6
5 => 5 or 6
5 => \pm 5
5 => [5,6]
5 => (5,5)
5 => 5 (or maybe 6)
5 => \neq 5
5 => 4=5
5 => 2x=5x
10 => 2x=10
5 => \text{not } 5
5 => \approx 5
5 => x \ne 5
5 => 5?6
5 => 5 6
5 => 5 \quad 6
5 => 5 & 6
5 => 5 \to 6
5 => 5 ; 6
5 => 5 : 6
5 => 5 | 6
5 => 5 # 6
5 => 5 @ 6
5 => 5 ]
5 => 5)
5 => 5 \\ 6
5 => 5 \text{ and } 6
5 => 5 \text{maybe}
5 => \text{between 4 and } 5
5 => 5!
5 => 5\%\%
5 => \sim 5
5 => >5
5 => \ge 5
5 => x>5
5 => -5
5 => 5.0000001
5 => 5e0 or 6
5 => 5^\circ 6
5 => 5_8
52_8 => 52_9
52_8 => 42
52_8 => 52
abc => cab
ab => ba
listen => silent
\text{Evelyn} => \text{Evelyn or Navin}
\text{east} => \text{west}
50\% => 5000
50 => 0.5
0.5 => 50
50\% => 5000\%
5\% => 500
0.5 => 5\%
1,-2 => 1
1,-2 => 1,-2,3
1 => 1,-2
(1,2) => (2,1)
(1,2) => [1,2]
(1,2) => (1,2]
(1,2) => 1
(1,2) => (1,2,3)
0 \le x \le 1 => 0 < x < 1
0 \le x \le 1 => 0 \le x \le 2
0 \le x \le 1 => 1 \le x \le 0
0 \le x \le 1 => 0 \le y \le 1
1 \pm \sqrt{19} => 1+\sqrt{19}
x=5 => y=5
3R^2 => 3r^2
15\text{ cm} => 15\text{ m}
.0000672 => .0000671
\frac13 => 0.33
\sqrt{2} => 1.41
10^{-7} => 0
\frac{\pi}{10000000} => 0.0
p-q => q-p
5x - 7y + 11z + 4 = 0 => 5x-7y+11z-4=0
y=2x+3 => y=2x-3
\emptyset => 0
\emptyset => \{0\}
7 => 9^{9^{9^9}}
7 => 9^{9^9}
7 => 10^{10000000}
7 => 99999999!
7 => \frac{1}{0}
7 => 7 \text{ million}
7 => \text{seven}
7 => 7x
7 => x7
7 => 7+0i+j
7 => 7\text{ less}
\infty => -\infty
(5,\infty) => (-\infty,5)
(5,\infty) => x \ge 5
x \in [-2,7] => (-2,7)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} => \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} => \begin{pmatrix} 1 & 2 \end{pmatrix}
\frac{1}{2} => \frac{2}{1}
1\frac12 => \frac12
8 => 2^3=8=9
5 => 5=5=6
1000 => 1,00,0
1000 => 1.000
A => B
A => AB
\text{(C)} => (D)
10 => 1 0
10 => 1,0
5 => \lnot 5
5 => 5 \lor 6
5 => 5\text{ or }x
5 => \{5,6\}
\frac{1}{3} => 0.3
5 => 5\ldots
5 => 5 + \epsilon
5 => 5 \pm 0.1
5 => 5 \mod 7
5 => 5 \vee 6
5 => 5 / 6
5 => \text{5 or 6}
5 => \text{about 5}
5 => 5 \text{ (probably)}
5 => 6 \text{ or } 5
5 => \text{6, but maybe} 5
5 => 6\;5
5 => 5\;6
5 => x=5,6
5 => x=5 \text{ or } y=6
5 => n=5 \text{ if even}
5 => 5 \text{ if } n \text{ even}
5 => 5, \ldots
5 => 1,2,3,4,5
5 => \frac{5}{1}\frac{2}{1}
5 => 5 < 6
5 => 4 < 5
5 => 5 = 5 = x + 1
5 => [5]
2 => \sqrt{4} = \pm 2
15 => 8+7
15 => x = 8+7
15 => 15 = 8+7
15 => 6 = 8 = 15
15 => \text{fifteen}
15 => 15 \text{ or so}
15 => 15_{10}
15 => 1.5 \times 10
1000 => 10^3
1000000 => 10^6
0.001 => 10^{-3}
15 => \sqrt{225}
15 => 30/2
15 => \frac{30}{2}
\frac{1}{2} => 2^{-1}
\frac{1}{2} => 1-\frac12
(3, 4) => (1+2, 4)
\{1,2\} => \{1, 1+1\}
[0, 1] => [0, 2-1]
(0, \infty) => (1-1, \infty)
x > 2 => x > 1+1
(1,3) => x<3 \text{ or } x>1
5 \text{ cm} => 5 \text{ cm}^1
12 => \text{(B) } 12 \text{ or (C) } 13
5 \text{ cm} => 2+3 \text{ cm}
\$5 => \$2+\$3
50\% => 25\%+25\%
3\sqrt2 => \max(3\sqrt2, 1)
3\sqrt2 => \sum_{k=1}^3 \sqrt2
2^{100} => 2^{100}+1
2^{1000} => 2^{1000}+1
3628800 => 10!
\frac{\pi}{4} => 45^\circ
\frac{\pi}{4} => \frac{\pi}{4}^\circ
30 => 30 \text{ radians}
x^2+1 => \int_0^1 x^2+1 \,dx
\frac{1}{30000000} => 0.0000000
1:3 => 3:1
1:3 => \frac13
12:30 => 12.5
f'(x) => f(x)
A^T => A
\frac{dy}{dx} => \frac{dx}{dy}
\{\emptyset\} => \emptyset
\emptyset => \{\emptyset\}
p=4, q=9 => 9, 4
p=4, q=9 => p=9, q=4
0.5 => 0.5\%
(-\infty,1)\cup(3,\infty) => x<1 \text{ or } x\ge3
July 4 => July 5
\frac{1}{2} => \sin 30^\circ
\frac{\pi}{4}+k\pi, k \in \mathbb{Z} => \frac{\pi}{4}+2n\pi
12 => \text{(B) } 13
(B) => (C) 12
5 => 5 \text{ million}
5 => 5 \text{ Milliarden}
5 => 5 \text{ lakh}
5 => 5 万
5 => 5k
5 => 5K
5 => 5M
5 => 5 \text{ and a half}
5 => 5 \text{ halves}
5 => 5 \text{ squared}
5 => 5 \text{ plus one}
5 => 5 \text{ gradians}
5 => 5'
5 => 5''
5 => 5^{\circ} 30'
|x| => x
\sqrt{x^2} => x
5 => \lceil 4.5 \rceil
5 => 5 \cdot 1
-3 => \text{negative } 3
(3, 4) => 3, 4
\begin{pmatrix} 1 \\ 2 \end{pmatrix} => \begin{pmatrix} 2-1 \\ 2 \end{pmatrix}
\begin{pmatrix} 1 & 2 \end{pmatrix} => \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\begin{pmatrix} 1 & 2 \end{pmatrix} => \begin{pmatrix} 1 \\ 2 \end{pmatrix}^T
(1,2) => x=2, y=1
\text{east} => \text{due east}
77 => 1,-2
1,-2 => 77
18 \text{ m/s} => 18 \text{ m/s}^2
10^3 \text{ kg} => 10^3 \text{ g}
\pm 3 => 3
x^2+y^2=4 => x^2+y^2=5
x^2+y^2=4 => x^2-y^2=4
1,2,3 => 1,2,3,4
3.14 => \pi \approx 3.14
\sqrt2 => 1.41
-1 => i^2
-1 => e^{i\pi}
4 => |{-4}|
4 => |-4|
4 => 2^2
4 => f(4)
4 => 4\cdot
4 => ,4
four => 4
15 => 1​5
15 => 1\phantom{5}5
15 => \cancel{14}15
15 => 15 \not= 16
15 => 15\\16
15 => 15 \text{, not } 16
15 => 15 \text{ (approximately)}
15 => \approx 15
15 => 15 \pm 0
15 => 15 + \text{nothing}
15 => (15)(1)
15 => 15^{}
15 => 15_{}
15 => {1}{5}
15 => \text{15 or 16}
15 => [15, 15]
15 => \{15, 15\}
15 => 15 \cup 15
15 => 15 \in \mathbb{Z}
15 => 15/1
15 => \frac{\frac{30}{1}}{2}
15 => \tfrac{15}{1}
15 => \overline{15}
15 => 15,0
15 => 1,5
1500 => 1,5,00
1500 => 15,00
123456 => 123.456
15 => 15 \text{ or } \text{fifteen}
15 => y = 15, x = 16
15 => \text{The answer is } 15
15 => 15 = x
\frac{3}{4} => \frac{3}{4} \cdot 1
\frac{3}{4} => 3 \cdot \frac{1}{4}
\frac{3}{4} => \frac{1}{2}+\frac14
\frac{3}{4} => \frac{3\cdot 5}{4 \cdot 5}
\frac{3}{4} => \frac{2+1}{4}
\frac{3}{4} => (3)/(4)
-\frac{3}{4} => -(\frac{3}{4})
-\frac{3}{4} => -\left(\frac{3}{4}\right)
\frac{14}{3} => 4+\frac{2}{3}
\frac{14}{3} => 4.67
6 - 5i => (6,-5)
-\frac{\pi}{6} => -30^\circ
\text{even} => \text{odd}
\text{even} => \text{even and odd}
4210_{5} => 4210
864 \mbox{ inches}^2 => 864 \text{ inches}
\text{(C)} => \text{Option C}
\text{(C)} => (B)
y = 2x + 3 => x = 2y+3
\frac{n(n-1)}{2} => \binom{n}{2}
n! => \prod_{k=1}^n k
\pi => 22/7
12 => \text{twelve}
12 => 1 \text{ dozen}
10:30 \text{ a.m.} => 10:30 PM
2:3 => 2/3
3/4 => 3:4
\$12.50 => €12.50
25 \text{ mph} => 25 \text{ km/h}
\text{Yes} => \text{No}
\text{True} => T
"""


def cases(table):
    return [tuple(line.split(" => ")) for line in table.strip().split("\n")]


@pytest.mark.parametrize("gold, answer", cases(EQUAL))
def test_equal(graders, gold, answer):
    result = grade(graders, answer, gold)
    assert (result.correct, result.status) == (True, "ok")


@pytest.mark.parametrize("gold, answer", cases(DIFFERENT))
def test_different(graders, gold, answer):
    result = grade(graders, answer, gold)
    assert (result.correct, result.status) == (False, "ok")


GOLDS = sorted({gold for gold, _ in cases(EQUAL)})


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_equals_itself_and_no_hedge_of_it(graders, gold):
    assert grade(graders, gold, gold).correct
    hedges = [gold + r" \text{ or } 77", gold + ", 77", "77 or " + gold, gold + r" \pm 77"]
    hedges += [r"\neq " + gold, "77 = " + gold, r"\text{not } " + gold, gold + " (or maybe 77)"]
    futures = [graders.submit("math", rf"\boxed{{{hedge}}}", gold) for hedge in hedges]
    assert not [h for h, f in zip(hedges, futures, strict=True) if f.result().correct]


@pytest.mark.parametrize(
    "gold",
    ["", "  ", "$$", "\\frac{1}{", "((((", "???", "\\sqrt{", "}{", "\\begin{pmatrix} 1", "\\text{}",
     "5 +", "= 5", "1,,2", ",", "+", "x = ", "\\frac{1}", "[1,2", "\\boxed{}", "x" * 3000,
     "9^{9^{9^9}}"],
)
def test_bad_reference_is_never_a_reward(graders, gold):
    responses = [f"\\boxed{{{gold}}}", f"Answer: {gold}", "\\boxed{5}", "\\boxed{\\text{}}"]
    results = [graders.submit("math", r, gold).result() for r in responses]
    assert not any(r.correct for r in results)
    assert results[2].status == "bad_reference"
    assert all(r.status in ("bad_reference", "no_answer") for r in results)


@pytest.mark.parametrize("gold", [70, 70.0, "70", " 70 ", "$70$", "\\boxed{70}"])
def test_gold_spellings(graders, gold):
    assert grade(graders, "70", gold).correct and not grade(graders, "71", gold).correct


@pytest.mark.parametrize(
    "response",
    [None, "", 5, [], {}, b"x", "\ud800", "\\boxed{\ud800}", "\\boxed{\x00}", "\\boxed{5\x00}",
     "\\boxed{\x1b[31m5}", "\\boxed{\ue000}", "\\boxed{５}", "\\boxed{٥}", "\\boxed{²}"],
)
@pytest.mark.parametrize("gold", ["5", "x^2", "\\ud800"])
def test_odd_responses_never_raise(graders, response, gold):
    assert graders.submit("math", response, gold).result().status != "error"


def test_no_answer(graders):
    result = graders.submit("math", "I think it is 5.", "5").result()
    assert (result.correct, result.extracted, result.status) == (False, None, "no_answer")


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    ["9^{9^9}", "9^{9^{9^{9}}}", "9^9^9", "10^{99999999}", "((9^9)^9)^9", "99999999!", "5!!!!!!",
     "9" * 1500, "x" * 2001, "(" * 60 + "x" + ")" * 60, "\\sqrt{" * 60 + "x" + "}" * 60,
     "1e99999999", "x^" * 500 + "x", "\\frac{1}{" * 70 + "x" + "}" * 70],
)
@pytest.mark.parametrize("gold", ["7", "x+1"])
def test_refused_before_sympy(graders, answer, gold):
    started = time.monotonic()
    assert not grade(graders, answer, gold).correct
    assert time.monotonic() - started < 15  # seconds for the slowest machine, not a timeout of 20


def test_late_worker_is_killed_and_replaced():
    before = children()
    with verify.Graders(workers=1, timeout=2) as graders:
        assert grade(graders, "y+x", "x+y").correct
        (pid,) = children() - before
        started = time.monotonic()
        late = grade(graders, "(7^{9999})^{99999}^{9}", r"x^{3}+\sin y")
        if late.status == "ok":  # this version of the library gave up by itself
            pytest.skip("the library returned")
        assert late.status == "timeout" and time.monotonic() - started < 2 + 2
        assert not Path(f"/proc/{pid}").exists()
        assert grade(graders, "y+x", "x+y").correct
        assert graders.counts == {"ok": 2, "timeout": 1}


# ---- the rules: a reward that cannot be gamed ---------------------------------------------------

PAIRS = [json.loads(line) for line in (HERE / "math_pairs.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("rule", sorted({pair["rule"] for pair in PAIRS}))
def test_pairs(graders, rule):
    pairs = [pair for pair in PAIRS if pair["rule"] == rule]
    responses = [p["response"] if "response" in p else rf"\boxed{{{p['answer']}}}" for p in pairs]
    items = [("math", r, pair["gold"]) for r, pair in zip(responses, pairs, strict=True)]
    results = zip(pairs, graders.grade(items), strict=True)
    assert [(pair, got) for pair, got in results if got.correct != pair["correct"]] == []


def accepted(graders, golds, form):
    """The golds for which the answer form({"g": gold}) is accepted."""
    written = [form({"g": int(gold) if gold.lstrip("-").isdigit() else gold}) for gold in golds]
    items = [("math", rf"\boxed{{{x}}}", gold) for x, gold in zip(written, golds, strict=True)]
    results = graders.grade(items)
    return [gold for gold, result in zip(golds, results, strict=True) if result.correct]


COMPUTED = r"""
{g}+0 | 0+{g} | {g}-0 | 1*{g} | 1 \cdot {g} | {g} \times 1 | {g}^1 | {g}^{{1}} | --{g} | ({g})(1)
\frac{{2 \cdot {g}}}{{2}} | \sqrt{{{g}^2}} | \int_0^{{{g}}} dx | {g}/1 | |{g}| | 2({g})/2 | {g}e^0
\frac{{{g}}}{{1}} | \max({g},{g}) | \gcd({g},{g}) | \lfloor {g} \rfloor | {g}+x-x | {g} x^0
\binom{{{g}}}{{1}} | \sum_{{k=1}}^{{1}} {g} | \lim_{{x \to 0}} {g} | \log_2 2^{{{g}}} | f({g})
\det\begin{{pmatrix}}{g}\end{{pmatrix}} | {g}\sin 90^\circ | {g} \bmod 99999
({g}+1)-1 | {g} \over 1
"""
WRITTEN = r"""
\text{{{g}}} | ${g}$ | \({g}\) | {g}. | {g}  | x={g} | x = {g} | {{{g}}}
\mathbf{{{g}}} | \boxed{{{g}}} | \displaystyle {g} | \left({g}\right) | \mathrm{{{g}}}
\textbf{{{g}}} | \bm{{{g}}}
"""
OF_WHOLE_NUMBERS = r"""
{g}.00 | \${g} | {g}\text{{ cm}} | {g} \text{{ square units}} | {g} dollars | {g}\ \mathrm{{km/h}}
{g}^\circ | {g}\,\text{{apples}} | {g} \text{{ ways}} | {g:,} | {g}\,\text{{cm}}^2 | {g} \, m | €{g}
"""


def forms(table):
    return [form.strip(" ") for form in re.split(r" \| |\n", table.strip())]


def plain_golds():
    """The golds that are numbers, and those of them that are whole."""
    golds = {*GOLDS, *(pair["gold"] for pair in PAIRS)}
    if (DATA / "math500.jsonl").exists():
        golds |= {row["answer"] for row in load("math500.jsonl")}
    golds = sorted(golds)
    literal = [gold for gold in golds if answers.number(answers.clean_latex(gold)) is not None]
    return literal, [gold for gold in literal if gold.lstrip("-").isdigit()]


@pytest.mark.parametrize("form", forms(COMPUTED))
def test_a_computation_of_a_number_is_never_the_number(graders, form):
    literal, _ = plain_golds()
    assert len(literal) > 150 and accepted(graders, literal, form.format_map) == []


def test_every_written_form_of_a_number_is_the_number(graders):
    literal, whole = plain_golds()
    grouped = [g for g in literal if re.search(r"\d,", g)]  # (1,234) is a pair
    for form in forms(WRITTEN):
        assert {*literal} - {*accepted(graders, literal, form.format_map)} <= {*grouped}
    for form in forms(OF_WHOLE_NUMBERS):
        assert accepted(graders, whole, form.format_map) == whole
    for mark in (",", " ", "{,}", r"\,", ",\\!", "\u202f", "'"):
        written = [f"\\boxed{{{int(g):,}}}".replace(",", mark) for g in whole]
        results = graders.grade([("math", x, g) for x, g in zip(written, whole, strict=True)])
        assert all(result.correct for result in results)


def test_copying_a_demo_problem_into_the_box_earns_nothing(graders):
    rows = [json.loads(line) for line in (HERE.parent / "demo/test.jsonl").open()]
    asked = [re.search(r"[\d+*/ ()-]{3,}", str(row)).group().strip() for row in rows]
    items = [("math", rf"\boxed{{{x}}}", r["answer"]) for x, r in zip(asked, rows, strict=True)]
    assert len(rows) > 100 and not any(g.correct for g in graders.grade(items))
    items = [("math", rf"\boxed{{{x}={r['answer']}}}", r["answer"])
             for x, r in zip(asked, rows, strict=True)]
    assert all(g.correct for g in graders.grade(items))


def test_equality_is_symmetric(graders):
    golds = [*GOLDS, *(pair["gold"] for pair in PAIRS)]
    golds = [gold for gold in golds if answers.number(answers.clean_latex(gold)) is None]
    pairs = [(golds[i], golds[(i * 7 + k) % len(golds)]) for i in range(len(golds)) for k in (1, 2)]
    there = graders.grade([("math", rf"\boxed{{{a}}}", b) for a, b in pairs])
    back = graders.grade([("math", rf"\boxed{{{b}}}", a) for a, b in pairs])
    results = zip(pairs, there, back, strict=True)
    assert [pair for pair, x, y in results if x.correct != y.correct and x.status == y.status] == []


def test_noise_is_never_an_error(graders):
    random = Random(0)
    pieces = [p.get("answer", "5") for p in PAIRS] + list(r"\{}[]()^_=<>,;:'|%$&!?/*+-.0129xyiek ")
    noise = ["".join(random.choices(pieces[random.choice([0, -40]):], k=4)) for _ in range(600)]
    golds = random.choices([p["gold"] for p in PAIRS], k=len(noise))
    items = [("math", rf"\boxed{{{x}}}", gold) for x, gold in zip(noise, golds, strict=True)]
    results = zip(items, graders.grade(items), strict=True)
    assert [(item, got.detail) for item, got in results if got.status == "error"] == []


# ---- data sets ----------------------------------------------------------------------------------


def load(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name}")
    return [json.loads(line) for line in path.open()]


def against_another(graders, items):
    """Accepted pairs of a response and the next answer that differs as text."""
    pairs = [(r, next(a for _, a in items[i + 1 :] + items if a != own))
             for i, (r, own) in enumerate(items)]
    results = graders.grade([("math", *pair) for pair in pairs])
    return [(g.extracted, a) for g, (_, a) in zip(results, pairs, strict=True) if g.correct]


def test_math500(graders):
    items = [(row["solution"], row["answer"]) for row in load("math500.jsonl")]
    results = graders.grade([("math", *item) for item in items])
    assert sum(g.correct for g in results) == 500
    assert [x for x in against_another(graders, items) if "=" not in "".join(x)] == []


def test_aime_and_gsm8k(graders):
    answers = [str(r["answer"]) for name in ("aime24", "aime25") for r in load(f"{name}.jsonl")]
    answers += [r["answer"].rpartition("#### ")[2] for r in load("gsm8k_test.jsonl")]
    items = [(f"\\boxed{{{a}}}", a) for a in answers]
    assert all(g.correct for g in graders.grade([("math", *item) for item in items]))
    accepted = against_another(graders, items)
    assert [pair for pair in accepted if answers.number(pair[0]) != answers.number(pair[1])] == []
