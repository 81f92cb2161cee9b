"""What the voices of the false text bench say: everyday sentences in languages that espeak-ng speaks."""

from __future__ import annotations

FOREIGN: dict[str, tuple[str, ...]] = {
    "de": (
        "Guten Morgen, wie haben Sie geschlafen?", "Der Zug nach Hamburg fährt heute von Gleis sieben.",
        "Kannst du bitte noch Milch und Brot mitbringen?", "Gestern hat es den ganzen Tag geregnet.",
        "Ich weiß nicht, wo ich meinen Schlüssel hingelegt habe.", "Ja, genau.", "Das Licht im Keller ist kaputt.",
    ),
    "fr": (
        "Bonjour, comment allez-vous aujourd'hui?", "Le train pour Lyon part dans dix minutes.",
        "Je voudrais un café et un croissant, s'il vous plaît.", "Il a plu toute la journée hier.",
        "Où est-ce que tu as mis les clés de la voiture?", "D'accord.", "Nous irons à la plage samedi prochain.",
    ),
    "es": (
        "Buenos días, ¿cómo está usted?", "El tren a Sevilla sale a las ocho y media.",
        "¿Puedes comprar leche y pan, por favor?", "Ayer llovió durante todo el día.",
        "No sé dónde he dejado las llaves.", "Muy bien.", "La luz de la cocina no funciona desde el lunes.",
    ),
    "it": (
        "Buongiorno, come sta?", "Il treno per Milano parte dal binario tre.",
        "Vorrei un caffè e un bicchiere d'acqua.", "Ieri ha piovuto tutto il giorno.",
        "Dove hai messo le chiavi della macchina?", "Va bene.",
    ),
    "pt": (
        "Bom dia, como está?", "O comboio para o Porto parte às nove horas.", "Queria um café e um pastel de nata.",
        "Ontem choveu o dia inteiro.", "Não sei onde deixei as minhas chaves.", "Está bem.",
    ),
    "nl": (
        "Goedemorgen, hoe gaat het met u?", "De trein naar Utrecht vertrekt van spoor vijf.",
        "Kun je melk en brood meenemen?", "Gisteren heeft het de hele dag geregend.", "Waar heb je de sleutels gelegd?",
    ),
    "pl": (
        "Dzień dobry, jak się pan czuje?", "Pociąg do Krakowa odjeżdża z peronu drugiego.",
        "Kup proszę mleko i chleb.", "Wczoraj cały dzień padał deszcz.", "Nie wiem, gdzie są moje klucze.",
    ),
    "ru": (
        "Доброе утро, как вы спали?", "Поезд в Москву отправляется через десять минут.",
        "Купи, пожалуйста, молоко и хлеб.", "Вчера весь день шёл дождь.", "Я не знаю, куда положил ключи.", "Хорошо.",
        "В субботу мы поедем на дачу к бабушке.",
    ),
    "ja": (
        "おはようございます、おげんきですか", "きょうはいいてんきですね", "つぎのでんしゃはなんじにでますか",
        "ぎゅうにゅうとパンをかってきてください", "きのうはいちにちじゅうあめがふっていました", "はい、わかりました",
        "かぎをどこにおいたかおぼえていません",
    ),
    "ko": (
        "안녕하세요, 잘 지내셨어요?", "오늘 날씨가 참 좋네요.", "다음 기차는 몇 시에 출발합니까?",
        "우유하고 빵을 사다 주세요.", "어제는 하루 종일 비가 왔어요.", "네, 알겠습니다.",
    ),
    "vi": (
        "Chào buổi sáng, bạn có khỏe không?", "Hôm nay trời đẹp quá.", "Chuyến tàu tiếp theo khởi hành lúc mấy giờ?",
        "Làm ơn mua sữa và bánh mì.", "Hôm qua trời mưa cả ngày.", "Vâng, tôi hiểu rồi.",
    ),
    "tr": (
        "Günaydın, nasılsınız?", "Ankara treni üçüncü perondan kalkıyor.", "Lütfen süt ve ekmek al.",
        "Dün bütün gün yağmur yağdı.", "Anahtarlarımı nereye koyduğumu bilmiyorum.", "Tamam.",
    ),
    "hi": (
        "नमस्ते, आप कैसे हैं?", "आज मौसम बहुत अच्छा है।", "अगली ट्रेन कितने बजे जाएगी?", "कृपया दूध और रोटी ले आना।",
        "कल पूरे दिन बारिश हुई।", "ठीक है।",
    ),
    "en-us": (
        "Good morning, how did you sleep?", "The next train to Boston leaves in ten minutes.",
        "Could you bring some milk and bread, please?", "It rained all day yesterday.",
        "I don't know where I put my keys.", "All right.", "The light in the hall has been broken since Monday.",
        "We are going to the beach with the children next Saturday.",
    ),
}  # fmt: skip
"""Sentences by espeak-ng's name of the language."""

MANDARIN = (
    "你今天晚上想吃什么", "我们明天早上八点在学校门口见", "他昨天没有来上班", "这个周末要不要一起去爬山",
    "妈妈刚才打电话来了", "外面下雨了记得带伞", "我把钥匙忘在办公室了", "孩子们在院子里玩", "这件衣服太贵了",
    "请问去火车站怎么走", "他们公司最近很忙", "小学同学下个月聚会", "我小时候住在乡下", "小度假村离这里不远",
    "晚饭已经做好了", "老师说明天考试", "你看过那部电影吗", "爱吃水果对身体好", "昨天的会议取消了", "客厅的灯好像坏了",
    "空调开得太冷了", "度过了一个愉快的假期", "现在已经很晚了", "他的手机没有电了", "图书馆几点关门",
    "我不知道该怎么办", "好的没问题", "是的", "等一下", "可以",
)  # fmt: skip
"""What people say to each other; none of it is meant for an appliance."""
