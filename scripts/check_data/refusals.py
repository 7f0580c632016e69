"""Whether a completion is a refusal, in English or Chinese, by its first sentences.

A refusal says in its own voice that it will not or cannot do what the prompt wants, and leaves it at that. An apology,
or "as an AI", is none by itself, and neither is one after which the answer follows. `tests/scripts/refusals.jsonl`
holds texts labelled by hand, `refusals_held_out.jsonl` others that no rule was made for, and docs/data.md the
precision and recall on both.
"""

import re

READ = 2_000  # characters that are looked at
OPENING = 600  # characters in which a refusal begins
SENTENCES = 4  # at the beginning of a text, of which one must refuse
ANSWERED = 160  # characters after the refusal of an ability from which they are an answer

# What a text without any of these cannot be: a quick look, as most texts are no refusals.
HINTS = (
    *("n't", "n’t", "am not", "'m not", "’m not", "do not", "did not", "will not", "would not", "could not", "can not"),
    *("is not", "are not", "must not", "should not", "may not", "rather not", "prefer not", "not to ", "not able"),
    *(
        "not something",
        "not appropriate",
        "not ethical",
        "not possible",
        "have no",
        "has no",
        "no can",
        "no comment",
        "is no ",
        "no way",
        "no,",
        "no.",
        "can only",
    ),
    *("only able", "only help", "only answer", "cannot", "never", "unable", "declin", "refus", "pass on", "neither"),
    *("irresponsible", "against", "inappropriate", "unethical", "lack", "violat", "outside", "beyond", "inability"),
)
# One of these is in each of those: most texts have none.
STEMS = (
    *("n't", "not", "no ", "no.", "no,", "never", "only", "unable", "declin", "refus", "pass on", "neither"),
    *("sponsib", "against", "propriate", "ethical", "lack", "violat", "outside", "beyond", "inability"),
)
ALL_HINTS = (*HINTS, *("不", "没", "无", "拒", "恕", "违", "超出", "超过", "谢绝", "暂", "只能"))
# And an English sentence without any of these.
OWN_VOICE = (
    *(
        "i ",
        "i'",
        "my ",
        "we ",
        "our ",
        "request",
        "question",
        "prompt",
        "topic",
        "appropriate",
        "ethical",
        "acceptable",
    ),
    *("of me", "for me", "sorry", "apolog", "unable to", "cannot", "can't", "no can"),
)


def _joined(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """The patterns that begin at a word as one, which is far faster to search for than each by itself; and the rest."""
    words = [pattern.removeprefix(r"\b") for pattern in patterns if pattern.startswith(r"\b")]
    others = [pattern for pattern in patterns if not pattern.startswith(r"\b")]
    joined = [rf"\b(?:{'|'.join(f'(?:{word})' for word in words)})"] if words else []
    return tuple(map(re.compile, [*joined, *others]))


THOUGHT = re.compile(r"\s*<(think|thinking|thought|reasoning)>.*?</\1>\s*", re.DOTALL)
STAGE = re.compile(r"[\s>#*_]*(?:<answer>|\\?answer:)?[\s>#*_]*", re.IGNORECASE)
QUOTED = re.compile(r"\"[^\"\n]{1,300}\"|“[^”\n]{1,300}”|「[^」\n]{1,300}」|《[^》\n]{1,60}》")
REPORTED = re.compile(  # in the voice of somebody else
    r"\b(?:says?|said|repl(?:y|ies|ied)|answers|answered|wrote|writes|asked|responds?|responded|thinks"
    r"|thought|translation"
    r"|example|output|response|refusal|sentence|reads|reading)\s?: |,\s(?:\w+\s){0,3}(?:said|wrote|thought"
    r"|replied|whispered"
    r"|sighed|answered|says|writes)\b|写道|说道|心想|想道|他说|她说|回答道|说着"
)
LEAD = re.compile(r"^(?:i'm |i am )?(?:so |very |really |truly |deeply )*(?:sorry|apologies|unfortunately)[.!]\s+")
STAGED = re.compile(r"\s*(?:\*[^\s*]|[(（\[【]|\d+[.)、]\s)")
SENTENCE = re.compile(r"[^.!?。！？\n]*(?:[.!?。！？\n]+|$)(?:[\"”’)]*\s*)")

_AI = (
    r"(?:an? |your |the )?(?:\w+[ -]){0,4}(?:ai\b|a\.i\.|artificial intelligence|language model|chat ?bot"
    r"|virtual assistant"
    r"|digital assistant|(?:computer|machine) program|learning (?:model|system)|machine\b|llm\b"
    r"|assistant\b)(?! (?:research|engineer|compan|expert"
    r"|scien|develop|student|lab|start|ethic|coach|manager|profess|direct|teach))"
)
_ADVERB = (
    r"(?:\W*\b(?:be able to|directly|really|actually|currently|in good conscience|ethically|legally|possibly"
    r"|simply|just"
    r"|at this time|at the moment|and will not|or will not|and won't|nor|personally|knowingly|morally|even"
    r"|unfortunately|also"
    r"|help you|assist you|help|assist|to|in any way|with|or|and|therefore|myself|ever)\b\W*)*"
)
_CANNOT = (
    r"(?:can(?:no|'| no)t|couldn't|could not|won't|will not|wouldn't|would not|shouldn't|should not|must not|may not"
    r"|(?:'m|am|is|are) (?:currently |also |therefore |still |simply |just |sorry but |really )*"
    r"(?:unable|not able|not allowed|not permitted|not in a position|not going"
    r"|not programmed|not designed|not authori[sz]ed|not capable of|not equipped|not comfortable(?: with)?"
    r"|not willing|unwilling"
    r"|not qualified|prohibited from|prevented from|forbidden|not at liberty|not trained)(?: to)?"
    r"|(?:must|have to|need to|will|shall|would|'ll|'d)?\s?(?:also |respectfully |politely |firmly |kindly "
    r"|have to )*"
    r"(?:decline|refuse|refrain from|abstain from)(?: to)?|(?:'d|would) (?:rather|prefer) not(?: to)?|prefer not to"
    r"|(?:do not|don't) (?:feel )?(?:comfortable|have the (?:ability|capability|capacity|authority|permission) to"
    r"|think i (?:can|should))"
    r"|lack the (?:ability|capability|capacity) to|never)"
)
# What the assistant refuses to do, whatever the object; and what needs an object that shows it is about the request.
_DO = (
    r"(?:help(?:ing)?|assist(?:ing|ance)?|comply(?:ing)?|fulfil(?:l|ling)?|provid(?:e|ing)|accommodat(?:e|ing)"
    r"|condon(?:e|ing)|endors(?:e|ing)"
    r"|promot(?:e|ing)|engag(?:e|ing) in|participat(?:e|ing)|facilitat(?:e|ing)|encourag(?:e|ing)"
    r"|generat(?:e|ing)|produc(?:e|ing)"
    r"|support(?:ing)? (?:this|that|your|the|any)"
    r"|respond(?:ing)? to|answer(?:ing)?|discuss(?:ing)?|creat(?:e|ing) (?:\w+ (?:content|images?|material)"
    r"|content|a|an|any|that|this|such|images?|text|explicit|malware|harmful|instructions)"
    r"|offer(?:ing)? (?:advice|instructions|guidance|help|assistance|any|an|a|information|medical|legal|financial"
    r"|that|personal|you)"
    r"|produc(?:e|ing) (?:\w+ (?:content|material)|content|that|this|any|such|a|an|material)|writ(?:e"
    r"|ing) (?:\w+ (?:content|stories|jokes|about|material)|content|a|an|any|that|this|such|about|code|your"
    r"|malware|something|explicit|erotic|hateful|fake|the)"
    r"|giv(?:e|ing) (?:you )?(?:\w+ )?(?:advice|instructions|medical|legal|financial|information|out|you"
    r"|any|personal|that"
    r"|specific|an? (?:opinion|diagnosis))"
    r"|shar(?:e|ing) (?:that|this|any|personal|private|such|information|the|details|instructions|my system"
    r"|confidential|someone|other)"
    r"|tell(?:ing)? you (?:how|that|about|where|what|who)|teach(?:ing)? (?:you|anyone|people)"
    r"|explain(?:ing)? how to|describ(?:e|ing) how"
    r"|do(?:ing)? (?:that|this|so|it|what you|anything|such)|fulfil|process(?:ing)? (?:your|this|that)|continu(?:e"
    r"|ing) (?:with )?(?:this|that|the conversation|our)"
    r"|complet(?:e|ing) (?:this|that|your|the)|perform(?:ing)? (?:this|that|such|any|the|actions|tasks|physical)"
    r"|pretend(?:ing)? to"
    r"|recommend(?:ing)? (?:any|a|that|specific|how)|make (?:such|that|a joke|jokes|any|this|an? (?:prediction"
    r"|judg)|judgments|statements|predictions|recommendations|purchases|phone|calls|moral)"
    r"|play(?:ing)? (?:that|along|the role)|role-?play|act(?:ing)? as|express(?:ing)? (?:personal|opinions"
    r"|an opinion|hate)|speculat(?:e|ing)|take (?:sides|part|a position|a stance)"
    r"|disclos(?:e|ing)|reveal(?:ing)?|diagnos(?:e|ing)|prescrib(?:e|ing)|carry(?:ing)? out|execut(?:e"
    r"|ing) (?:this|that|your|commands|code|someone|any)|translat(?:e|ing) (?:this|that|such)"
    r"|entertain (?:this|that|such)|satisfy (?:this|that|your)|handle (?:this|that|such|your)|agree to"
    r"|go along with|get into|talk about|comment on|speak (?:on|about)|advise (?:on|you)|guide you"
    r"|walk you through"
    r"|send(?:ing)?\b|browse|access|open (?:links|files|urls|the (?:link|file|attachment))|view|see (?:images?"
    r"|pictures?|the (?:image|picture|attachment|file|link))|look up|search the|search for|listen to|watch|predict"
    r"|hear|remember (?:past|previous|our)"
    r"|verify|check (?:the|your|real|current|live)|retrieve|connect to|interact with|analy[sz]e (?:images"
    r"|the (?:image|picture|attachment))|read (?:your|the (?:file|image|attachment|document|link))|book|schedule"
    r"|set (?:an alarm|a reminder|alarms)|order (?:food|a|it)|place (?:an order|a call|orders)|call (?:a|your"
    r"|someone|the)|know (?:your|what you)|have (?:feelings|emotions|opinions|personal|a (?:favou?rite|body"
    r"|physical)))"
)
_RELUCTANT = (
    r"(?:(?:'d|would) (?:rather|prefer) not(?: to)?|prefer not to|(?:not|n't) (?:feel |be )?comfortable(?: with)?"
    r"|(?:decline|refuse|unwilling) to"
    r"|(?:must|have to|going to|will|need to) (?:have to )?(?:respectfully |politely )?(?:decline|refuse)(?: to)?)"
)
_DO_ANY = (
    r"(?:comment|reveal|get|writ|shar|say|mak|creat|giv|tell|discuss|answer|help|assist|provid|generat|engag"
    r"|support|participat|tak|do|comment|speculat|describ"
    r"|explain|produc|role|play|continu|respond|offer|express|recommend|joke|go)\w*"
)
WILL_NOT = _joined(
    (
        rf"^(?:\W|no|hello|hi|but|oh|dear|so|and)*(?:i'm |i am |my |please accept my )?(?:so |very |really "
        rf"|truly |deeply )*"
        rf"(?:sorry|unfortunately|regrettably|apologies|i apologi[sz]e)\b[^.!?]{{0,60}}?\bi(?: "
        rf"|(?=')){_CANNOT}{_ADVERB}\W+"
        rf"(?!come|attend|make it|join|go\b|meet|stay|wait|be\b|believe|find|agree|sleep|lend|pay|accept"
        rf"|let\b|remember|reach|see "
        rf"(?:any|why|how)|use\b|reproduce|follow your|hear|afford|keep|leave|return|pick|visit|visit)\w",
        r"\b(?:sorry|apolog\w+|unfortunately)\b[^.!?]*\b(?:is|are|am|'m|isn't|aren't) (?:not "
        r"|strictly )?(?:permitted|allowed|prohibited"
        r"|forbidden|supported)\b",
        r"\bbeyond what i\b|\b(?:no|any) (?:responsible|safe|ethical|legal) way (?:for me )?to (?:help|do"
        r"|answer|assist)",
        r"\bso i (?:won't|will not|can't|cannot)[.!]",
        r"\bi(?:'m| am) (?:\w+ly )?not (?:equipped|designed|programmed|allowed|permitted|authori[sz]ed"
        r"|trained|capable of)\b",
        r"\bi (?:have been |was |am |'ve been )?(?:instructed|told|trained|programmed|designed|built|made|asked) "
        r"(?:not to|never to|to (?:decline|refuse|avoid|not))",
        r"\bi (?:can |could |am |may )?only (?:able to )?(?:help|assist|answer|discuss|respond|talk about)",
        r"^(?:\W|sorry|but|no|unfortunately)*i (?:do not|don't) (?:engage in|provide|support|participate"
        r"|promote|assist|offer"
        r"|create|generate|write|produce|discuss|comment|endorse|condone|take part|answer|make predictions|speculate"
        r"|feel (?:right|good|okay|ok) about|share (?:personal|private|such|that|this|any))",
        r"\bi(?: also| just)? (?:can't|cannot|won't|will not) (?:write|create|produce|generate)\b",
        r"(?:^|\W)(?:and|but|so) (?:can't|cannot|won't|will not|am not able to|am unable to) (?:write"
        r"|create|help|assist|provide|do|share|answer)\b",
        rf"\bi(?: am|'m| do| would)?\W?\s?(?:\w+ly )?{_RELUCTANT} {_DO_ANY}\b",
        rf"\bi(?<!if i)(?<!when i)(?<!whether i)(?<!unless i)(?<!what i)(?<!why i)(?<!because i)(?: "
        rf"|(?='))(?:\w+ly |also "
        rf"|just |still |simply )?{_CANNOT}{_ADVERB}[\s,]*{_DO}",
        rf"^(?:\W|sorry|unfortunately|but)*we {_CANNOT} (?:process|fulfil|comply|assist|help|provide|generat"
        rf"|complete your|accept your)",
        r"^(?:\W|no|sorry|but|oh|dear)*i (?:can't|cannot|won't)(?: do (?:that|this))?[.!]",
        rf"^(?:\W|unfortunately|sorry|no|nope|but)*(?:{_CANNOT}|can't){_ADVERB} (?:help|assist|comply|do that"
        rf"|provide|answer)",
        r"\bi(?: |(?='))(?:must|have to|need to|will have to|am going to have to|'ll have to|respectfully|politely"
        r"|firmly|kindly|'m going to have to)"
        r" (?:\w+ly )?(?:decline|refuse|pass on|say no)\b(?! to (?:believe|let|accept that|give up))",
        r"^(?:\W|no|sorry|but|and|so)*i (?:decline|refuse)(?=[.,!]|$| this| that| your)",
        r"\b(?:that|this|it)(?:'s| is) (?:just |simply |really )?(?:not something|something) (?:that )?(?:i"
        r"|we)(?:'m| am| can| will| would| won't| cannot| could| do|'d)",
        r"\bnot something (?:that )?(?:i|we)(?:'m| can| am| will| would|'d| feel| could| do)",
        r"\b(?:goes|go|is|are|would be|be|going|it's|that's) (?:directly )?against (?:my|our|the (?:policy"
        r"|policies|rules|guidelines|terms)|openai|company policy|\w+ (?:policies|guidelines))",
        r"\b(?:violat\w+|contraven\w+|breach\w*) (?:of )?(?:my|our|the|openai|these|content|ethical|community"
        r"|usage)\b[^.]{0,30}(?:polic|guideline|rule|terms|principle|standard)",
        r"\b(?:request|question|prompt|topic|content|query|task)\b[^.]{0,25} (?:is|are|seems?|appears?|may be"
        r"|might be|falls?|goes) (?:to be )?"
        r"(?:\w+ly )?(?:inappropriate|not appropriate|harmful|offensive|unethical|against|outside|beyond"
        r"|out of scope|disrespectful|not something)",
        r"\b(?:your|this|that|such a?) (?:request|question|prompt|task)s? (?:can ?not|can't|could not|will not"
        r"|won't) be",
        r"\bi(?: can| could| would|'d| will|'ll)? ?(?:do not|don't|not|never|cannot|can't|will not|won't"
        r"|am not going to)?,? (?:and will not )?(?:condone|tolerate|endorse)\b",
        r"\b(?:it is|it's|it would be|it wouldn't be|it would not be|that would be|it isn't|that is|that's"
        r"|would be) (?:\w+ly |not |also |both |neither )*"
        r"(?:appropriate|inappropriate|ethical|unethical|acceptable|unacceptable|irresponsible)"
        r"(?:,? (?:and|or|nor) (?:\w+ly )?\w+){0,2} (?:for me to|of me to|(?:for \w+ )?to (?:help|assist|provid"
        r"|discuss|ask|speculat|make (?:such|assumption|general|joke|fun|light)"
        r"|shar|suggest|promot|use (?:such|derog|offens|racial)|engag|jok|writ|generat|creat|encourag|assum"
        r"|generali|stereotyp|reveal|plan|harm|attack|kill|steal|damag|convince people"
        r"|access (?:someone|another)|find (?:someone|personal|your ex)|spread|advis|answer|describ))",
        r"\boutside (?:of )?(?:my|the) (?:scope|capabilities|abilities|expertise|purview|area)|\bbeyond (?:my"
        r"|the scope of my) (?:capabilit|abilit|scope|knowledge|programming|current|expertise|purview)",
        r"\bno (?:can do|comment)\b[.!]|neither confirm nor deny|\b(?:isn't|not) possible for me to"
        r"|\bsomething (?:that )?i(?:'m| am|'ll)? (?:can't|cannot|won't|not|will not)",
        r"\b(?:sorry|apolog\w+)\b[^.!?]{0,20}\bi (?:can|could|may) only (?:answer|help|assist|discuss|respond"
        r"|provide|talk)|\bi(?: will|'ll) (?:have to )?pass on (?:this|that)",
        r"\b(?:my|our) (?:guidelines|policies|programming|principles|training|instructions|safety"
        r"|ethical guidelines|content policy|policy)[^.]{0,25} (?:do not|don't|prevent|prohibit|forbid|does not"
        r"|doesn't|won't) ",
        r"\bi(?:'m| am) not (?:the right|able|comfortable|willing|going to)\b[^.]{0,40}\b(?:help|answer|that|this"
        r"|engage|discuss)",
        r"\b(?:can't|cannot|unable to|not able to) (?:be of (?:help|assistance|service)|help"
        r"|assist) (?:you )?(?:with|in|on|there|here)\b",
    )
)
SORRY = r"(?:sorry|apologi[sz]e|apologies|unfortunately|regret|afraid|forgive me|pardon)"
NO_ABILITY = _joined(
    (
        rf"\b(?:as|i am|i'm|being|since i'm|because i'm|since i am) (?:just |only |merely |simply )*{_AI}[^.!?]*?"
        r"(?:\b(?:i|and|or|so) (?:\w+ )?(?:cannot|can't|lack|never)\b|\bunable|\bincapable|\black of"
        r"|without (?:feelings|emotions|a body)"
        r"|\bnot (?:able|capable|allowed|permitted|equipped|designed|programmed|authori[sz]ed|human|a (?:human"
        r"|person|real|doctor|lawyer))"
        r"|(?:\bnot|n't) (?:\w+ly )?(?:have|possess|hold|form|experience|feel\b|express|want|engage|provide|know"
        r"|understand|exist|own|take|make|want|eat|need|drink|sleep|age)|\bhave no|\bpossess no|\bno (?:personal"
        r"|feelings|emotions|access|body|opinions?))",
        r"^\W*(?:\w+\W+){0,3}?i (?:do not|don't|actually don't|also don't|currently don't) (?:actually |currently "
        r"|really )?(?:have|possess|hold|form|experience)"
        r" (?:\w+ )?(?:personal|feelings|emotions|opinions|preferences|beliefs|access|the (?:ability|capability"
        r"|capacity|means|tools|necessary)|real[- ]time"
        r"|consciousness|experiences|a (?:body|physical|favou?rite|personal|name|gender)|any (?:information|data"
        r"|personal|feelings|knowledge|records?|way)|information (?:about|on)|live|internet|up-to-date|current"
        r"|enough (?:information|context)|sufficient)",
        r"^\W*(?:\w+\W+){0,3}?i have no (?:\w+ )?(?:feelings|emotions|opinions?|personal|access|way of"
        r"|information (?:about|on)|ability|preferences|knowledge of|idea what|data)",
        r"^\W*(?:\w+\W+){0,3}?i lack (?:the|access|personal|sufficient|enough)",
        rf"\b{SORRY}\b[^.!?]*\bi (?:do not|don't|did not|didn't|cannot|can't|am not able to|am unable to|have no"
        rf"|couldn't|could not) "
        r"(?:understand|catch|get that|have|know|quite|find (?:any|the (?:file|image|attachment))|recall|open|see"
        r"|hear|access|follow|make sense|recogni[sz]e|possess|process|identify|determine|tell)",
    )
)
# After a refusal: what begins the answer, and what is only an offer of another.
TURNS = re.compile(
    r"(?:(?:^|[.!?\n])[\s*]*(?:but|however|that said|that being said|having said that|with that (?:said|in mind"
    r"|caveat)|nevertheless|nonetheless|still)\b|"
    r"[,;][\s](?:but|however|though|although|yet)\b)(?!\s(?:also|can\b|may\b|rather|is\b|are\b|has\b|have\b|could"
    r"|they|must|should|will\b|would\b|that can|merely|simply))[,:]?\s*"
)
OFFER = re.compile(
    r"(?:i(?:'m| am|'d| would|'ll| will| can| could| do)? ?(?:be |also |certainly |still |always |instead "
    r"|definitely |only )*"
    r"(?:able to |happy to |glad to |more than happy to |here to |here for you|willing to |love to |like to "
    r"|strongly )*"
    r"(?:help|assist|offer|suggest|provide|recommend|share|support|answer|discuss|encourage|urge|advise|guide"
    r"|point|try|direct|strongly|"
    r"happy|glad|here|want|hope|understand|must|think|believe|need|cannot|can't|do not|don't|will not|won't|am not"
    r"|'m not|unable|not)\b"
    r"|i(?:'m| am)?,? (?:happy|glad|here|not|unable|sorry|afraid|just|only|still|always|un)|if you|please"
    r"|feel free|let me know|you (?:can|could|may|might|should|would)\b"
    r"|we (?:can|could|should)\b|(?:it|this|that)(?:'s| is|'d be| would be| may| might| can| could| does| goes)\b"
    r"|is there|would you|what i can|there are (?:many |other |plenty |several |some )?(?:resources|people|ways"
    r"|hotlines|legal|alternatives|organi)"
    r"|remember|perhaps|maybe|instead|any |such|your|do not|don't|not\b|always|thank|to |for |in (?:that|this"
    r"|any) case|as (?:an? )?(?:ai|an|i)\b|my (?:purpose|goal|guidelines|aim|role|programming)|the (?:use|creation"
    r"|act|request|topic|information))"
)
ANSWER = re.compile(
    r"(?:^|[.!?\n,;:]\s*|\b(?:but|however),? )(?:here(?:'s| is| are) (?!to help|to assist|if|for you"
    r"|some (?:resources|hotlines|ways you can (?:get|seek)|organi))\w+"
    r"|the (?:short |correct |right |final |simple )?answer (?:is|to)|generally speaking,"
    r"|my best (?:guess|estimate)|it(?:'s| is| was) (?:about|around|roughly|probably|likely|\d)"
    r"|i(?:'ll| will| can) (?:try (?!to help)|do my best|give you (?:a|an|some|the|my)|tell you (?:that|what|about"
    r"|how)|explain (?:that|what|how|the)))"
)
LIST_OR_CODE = re.compile(r"```|\\boxed|^\s*(?:\d+[.)、]|[-*•])\s+\S[^\n]*\n+\s*(?:\d+[.)、]|[-*•])\s", re.MULTILINE)
MORE_HELP = re.compile(
    r"(?:can|could|may|if|would|is there|let me|feel free|do you|what else|how else|please|instead|thank|i'm here"
    r"|you (?:can|should|may|might)|consult|contact|reach out|it is (?:important|always|best)"
    r"|it's (?:important|always|best)|i (?:am|'m|exist|was|only|just|simply|cannot|can't|do not|don't|operate|can"
    r"|would|encourage|suggest|recommend|apologi)|my (?:purpose|responses|goal|knowledge|training)|i'm|we)\b"
)

_ZH_LEAD = r"(?:(?:真的|真是|非常|十分|很|实在|深感|深表)?(?:抱歉|对不起|不好意思|遗憾|歉意)|sorry)"
_ZH_AI = (
    r"(?:ai|人工智能|智能助|语言模型|语言大模型|大模型|聊天机器人|机器人|虚拟助|助手|计算机程序"
    r"|程序(?!员))(?!工程|专家|研究|公司|领域|专业|老师|教师|行业|从业|开发者|学者|学生|技术员|爱好者)"
)
_ZH_CANNOT = (
    r"(?:无法|不能够?|不可以|没有?办法|没法|不会|不便|不方便|不应该?|不该|无权|拒绝|恕不|不予|不愿意?|不支持"
    r"|不提供|不适合|不得|难以|不允许|不被允许|未被授权|没有能力|没有权限|无能力)"
)
_ZH_DO = (
    r"(?:提供|协助|帮助|帮你|帮您|帮忙|帮到|回答|回复|答复|解答|满足|完成|支持|生成|创作|编写|撰写|写出?|讨论"
    r"|参与|执行|处理|给出|给您|给你|为您|为你|向您|向你|透露|泄露|分享|响应|回应"
    r"|接受您?的?|认同|按照|配合"
    r"|从事|答应|告诉|告知|评论|评价|介绍|描述|教|指导|进行|继续|做出|做到|做这|做任何|这样做|推荐|预测|翻译这"
    r"|访问|打开|查询|查看|识别|浏览|获取|连接|发表|表达|判断|诊断|扮演|模拟|涉及"
    r"|谈论|就此|对此|对这|对您|对你|发送|拨打|播放|下单|预订|看到|听到|作答|作出|应答|受理|置评|评判|理解"
    r"|确定您|确认|实时|代替|替您|替你|代写|伪造|制作|搜索|联网|上网)"
)
ZH_WILL_NOT = _joined(
    (
        rf"(?:我们?|本人|本助手|小助手)(?:[^，。！？\n]{{0,12}}?[，,]?){_ZH_CANNOT}[^，。！？\n]{{0,6}}?{_ZH_DO}",
        rf"{_ZH_LEAD}[^。！？\n]{{0,24}}?{_ZH_CANNOT}[^，。！？\n]{{0,8}}?{_ZH_DO}",
        rf"^\W*(?:{_ZH_CANNOT})(?:为您|为你|就此|对此|给您|向您)?(?:提供|协助|帮助您|帮助你|回答|满足|透露"
        rf"|生成|作答|回应)",
        r"我(?:真的|也|可|实在|恐怕)*(?:帮不了|帮不到|帮不上|做不到|办不到)|我(?:可|真的)?(?:不能|无法)说[。！!]"
        r"|不认为我(?:可以|能|应该)|(?:内容"
        r"|信息)[^。！？\n]{0,14}无法(?:显示|展示|提供)",
        r"(?:抱歉|对不起|不好意思)[^。！？\n]{0,6}我?只能(?:回答|解答|处理|提供|讨论)|(?:问题|请求|内容"
        r"|输入)[^。！？\n]{0,6}(?:包含|含有"
        r"|涉及)[^。！？\n]{0,6}(?:不当|违规|敏感|有害|非法|违法)",
        r"恕(?:我|本人)?(?:无法|不能|难以|直言.{0,6}不能|难从命)|(?:我|必须|只能|不得不)(?:必须|要|会|只能"
        r"|坚决)?(?:拒绝|谢绝|婉拒)",
        r"(?:请求|问题|要求|内容|话题|提问|行为)[^。！？\n]{0,20}(?:违反|违背|超出|不符合"
        r"|触及)[^。！？\n]{0,14}(?:规定|准则|原则|政策|范围|规范|法律|道德|伦理|能力"
        r"|底线|法规|安全)",
        r"(?:超出|超过)(?:了)?我的(?:能力|知识|服务|职责|权限)",
        r"(?:这个|此|该|您的|你的|这类|此类)(?:问题|请求|要求|话题|内容)[^。！？\n]{0,8}(?:无法|不能|不便|不予"
        r"|恕不)(?:被)?(?:回答|满足|处理|提供|讨论|回应|完成|评论"
        r"|作答|回复)",
        r"我(?:绝)?不(?:会|能|可以|应该)?(?:支持|鼓励|提倡|赞同|认可|参与|协助|纵容)(?:任何|这种|此类|这样|该|非法"
        r"|违法|以|您|你|或)",
        r"暂不(?:支持|提供)|不会(?:照做|这么做|这样做)|(?:请求|要求|问题)(?:很|非常|并)?不(?:合适|恰当|妥当)",
        r"还没有?学(?:会|习)(?:如何|怎么|怎样)?回答",
        r"(?:让我们|我们)(?:还是)?换(?:个|一个)话题",
    )
)
ZH_NO_ABILITY = _joined(
    (
        rf"(?:作为|身为|我(?:只|仅仅?)?是)(?:一个|一名|一款|一种|一位|个"
        rf"|名)?[^，。！？\n]{{0,12}}{_ZH_AI}[^。！？\n]{{0,30}}?"
        r"(?:没有|无法|不能|不具备|不具有|不会有|并不|不是人|不会(?:感|拥|产|做)|缺乏|不拥有|不可能|无权|不存在)",
        r"^\W*(?:(?:您好|你好|嗨|抱歉|对不起|不好意思|很抱歉)\W*)?我(?:本身|并|还|目前|暂时|现在)*(?:没有|不具备"
        r"|不具有|不拥有|缺乏)[^。！？\n]{0,8}"
        r"(?:情感|感情|感受|意识|个人|身体|能力|权限|实时|信息|数据|观点|喜好|偏好|主观|情绪|经历|功能|自我)",
        rf"{_ZH_LEAD}[^。！？\n]{{0,10}}我(?:不知道|不清楚|不太?明白|没有?(?:听懂|理解|找到|看到|收到)"
        rf"|不太?理解|不了解|听不懂|看不懂|不确定|没能)",
    )
)
ZH_TURNS = re.compile(r"(?:但是?|不过|然而|尽管如此|虽然如此|即便如此|话虽如此|可是|只是)[，,：:]?")
ZH_OFFER = re.compile(
    r"(?:我(?:们)?(?:很|非常|也|仍然?|还|依然|始终|只|一直|会|将)?(?:可以|能够?|愿意|乐意|高兴|会|建议|希望"
    r"|很乐意|想|理解|鼓励|随时)(?:为|帮|协助|尝试|尽力|在|向|给|陪"
    r"|与|和|一直|其他|回答|提供|推荐|继续|您|你|尽量|介绍|就|从|提醒|解答|讨论|分享|支持)?"
    r"|如果|若|请|您(?:可以|可|不妨|也可|如果|应该|需要|有)|你(?:可以|可|不妨|也可|如果|应该|需要|有)|建议"
    r"|欢迎|希望|任何|这(?:种|是|类|样|个|并)|必须|需要|应该?|我(?:不|无"
    r"|没|只)|有(?:什么|其他)|也(?:不|无)|作为|安全|随时|由于|因为|您的|你的)"
)
ZH_ANSWER = re.compile(
    r"(?:以下(?:是|为|几|一些|内容)|如下[：:]|答案是|一般来说|一般而言|通常(?:来说|情况下|而言|，|是|会|需要)"
    r"|总的来说|总体(?:来说|而言|上)|简单来说|大致(?:来说|上|是|可以)"
    r"|大约|大概|根据(?:我的|公开|已有|现有|资料|历史|题意|题目|数据|常识|目前|以往)"
    r"|可以(?:告诉|说的是|肯定|确定)|我(?:可以|来|能|会)(?:告诉|解释|讲讲|说说|简单|谈谈|给你讲|给您讲))"
)
ZH_MORE_HELP = re.compile(r"(?:如果|若|请|您|你|欢迎|建议|希望|我|有什么|有其他|谢谢|感谢|很(?:乐意|高兴)|随时|还有)")


def refuses(text: str) -> bool:
    """Does the text refuse what its prompt wants, and leave it at that?"""
    text = text[:READ]
    opening = text[:OPENING].lower()
    if opening.isascii() and not _has(opening, STEMS):
        return False
    if not _has(opening, HINTS if opening.isascii() else ALL_HINTS):
        return False
    text = THOUGHT.sub("", text, count=1)
    if STAGED.match(text):  # the direction of a scene, or a list
        return False
    text = text[STAGE.match(text).end() :].replace("’", "'").lower()  # pyrefly: ignore[missing-attribute]  it matches nothing too
    if text[:1] in '"“「『{|':  # what somebody else says, or JSON
        return False
    text = LEAD.sub("sorry, ", QUOTED.sub("…", text))
    chinese = not text.isascii() and any("\u4e00" <= character <= "\u9fff" for character in text[:200])
    will_not, no_ability = (ZH_WILL_NOT, ZH_NO_ABILITY) if chinese else (WILL_NOT, NO_ABILITY)
    place = 0
    for _ in range(SENTENCES):
        sentence = SENTENCE.match(text, place)
        if not sentence or place >= min(len(text), OPENING):
            return False
        for patterns, is_ability in ((will_not, False), (no_ability, True)):
            if not chinese and not (_has(sentence[0], HINTS) and _has(sentence[0], OWN_VOICE)):
                break
            if found := next((match for pattern in patterns if (match := pattern.search(sentence[0]))), None):
                if REPORTED.search(sentence[0]):
                    return False
                return not _answers(text[place + found.end() :], chinese, is_ability)
        if (ZH_ANSWER if chinese else ANSWER).search(sentence[0]):
            return False
        place = sentence.end()
    return False


def _has(text: str, parts: tuple[str, ...]) -> bool:
    for part in parts:  # noqa: SIM110  twice as fast as any()
        if part in text:
            return True
    return False


def _answers(rest: str, chinese: bool, is_ability: bool) -> bool:
    """Does an answer follow in the text after a refusal?"""
    turns, offer, answer, more_help = (
        (ZH_TURNS, ZH_OFFER, ZH_ANSWER, ZH_MORE_HELP) if chinese else (TURNS, OFFER, ANSWER, MORE_HELP)
    )
    first = SENTENCE.match(rest).end()  # pyrefly: ignore[missing-attribute]  as STAGE
    for turn in turns.finditer(rest):
        clause = rest[turn.end() :]
        end = SENTENCE.match(clause).end()  # pyrefly: ignore[missing-attribute]  as STAGE
        if turn.end() > first and turn[0][0] in ",;":
            continue  # a turn within a later sentence is about something else
        if answer.search(clause[:end]) or (not offer.match(clause) and end > 12):
            return True
    if not is_ability:
        return False
    if LIST_OR_CODE.search(rest):
        return True
    other = 0  # characters of sentences that are neither of the refusal nor an offer
    for sentence in SENTENCE.finditer(rest[SENTENCE.match(rest).end() :]):  # pyrefly: ignore[missing-attribute]  as STAGE
        if answer.search(sentence[0]):
            return True
        other += 0 if more_help.match(sentence[0].lstrip()) else len(sentence[0]) * (3 if chinese else 1)
    return other >= ANSWERED
